"""Promise 1: what lands on disk is the state at the moment of `save`, eager, lazy and streamed; torn ones are
refused.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, TornSnapshotError

from ..support.comparing import torch_bytes
from ..support.stepping import saved

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=2),
}


class Training:
    """A tiny real training: a model with BatchNorm, and an optimizer."""

    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], width: int = 64) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, width)
        )
        self.optimizer = make(self.model.parameters())
        self.data = torch.randn(16, width)

    def loss(self) -> torch.Tensor:
        self.optimizer.zero_grad()
        loss = self.model(self.data).square().mean()
        loss.backward()
        return loss

    def step(self) -> None:
        self.optimizer.step(self.loss) if isinstance(self.optimizer, torch.optim.LBFGS) else (
            self.loss(),
            self.optimizer.step(),
        )

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}


def frozen(obj: Any) -> Any:
    """A deep copy made now."""
    if isinstance(obj, torch.Tensor):
        return obj.detach().clone()
    if isinstance(obj, dict):
        return {k: frozen(v) for k, v in obj.items()}
    if isinstance(obj, (list, tuple)):
        return type(obj)(frozen(v) for v in obj)
    return obj


def assert_same(a: Any, b: Any, path: str = "state") -> None:
    if isinstance(b, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(b, dict):
        assert list(a) == list(b), path
        for key in b:
            assert_same(a[key], b[key], f"{path}[{key!r}]")
    elif isinstance(b, (list, tuple)):
        assert len(a) == len(b), path
        for k, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{k}]")
    else:
        assert a == b, path


@pytest.mark.parametrize("guarded", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_saved_state_is_that_of_save(tmp_path: Path, name: str, guarded: bool) -> None:
    training = Training(OPTIMIZERS[name])
    expected = {}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=32 << 20, chunk_bytes=16384) as engine:
        if guarded:
            engine.guard(training.optimizer)
        for k in range(6):
            training.step()
            expected[f"t{k}"] = frozen(training.state())
            saved(engine, training.state(), f"t{k}", path="state.pt")
            # BatchNorm statistics change in the forward pass, parameters in the step.
            training.model(training.data)
        training.step()
    for tag, state in expected.items():
        assert_same(torch.load(tmp_path / tag / "state.pt"), state, tag)


def test_guarded_save_is_lazy_and_unguarded_tensors_are_eager(tmp_path: Path, held_copies: Any) -> None:
    training = Training(OPTIMIZERS["adamw"])
    training.step()
    with AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20) as engine:
        engine.guard(training.optimizer)
        held = held_copies(engine)
        expected = frozen(training.state())
        pending = saved(engine, training.state(), path="state.pt")
        assert pending.metrics.saves[0].mode == "lazy"
        # The copy thread has not run at all, so these must have been copied inside save().
        training.model(training.data)
        assert not torch.equal(training.model[1].running_mean, expected["model"]["1.running_mean"])
        training.loss()
        held.let_go()
        training.optimizer.step()
        pending.result(60)
    assert_same(torch.load(tmp_path / "t" / "state.pt"), expected)


def test_the_guard_waits_in_the_step(tmp_path: Path, held_copies: Any) -> None:
    training = Training(OPTIMIZERS["adamw"])
    training.step()
    with AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20) as engine:
        engine.guard(training.optimizer)
        held = held_copies(engine)
        expected = frozen(training.state())
        saved(engine, training.state(), path="state.pt")
        training.loss()
        stepping = threading.Thread(target=training.optimizer.step)
        before = training.model[0].weight.detach().clone()
        stepping.start()
        stepping.join(0.2)
        assert stepping.is_alive() and torch.equal(training.model[0].weight, before)
        held.let_go()
        stepping.join(60)
        assert not torch.equal(training.model[0].weight, before)
    assert_same(torch.load(tmp_path / "t" / "state.pt"), expected)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(
            lambda t: t.model.load_state_dict({k: v + 1 for k, v in t.model.state_dict().items()}), id="load_state_dict"
        ),
        pytest.param(lambda t: t.model[0].weight.data.detach_().requires_grad_(False), id="harmless"),
        pytest.param(lambda t: torch.no_grad()(lambda: t.model[0].weight.mul_(2))(), id="no_grad in place"),
    ],
)
def test_change_behind_the_guard_is_torn_or_right(
    tmp_path: Path, held_copies: Any, change: Callable[[Training], Any]
) -> None:
    training = Training(OPTIMIZERS["adamw"])
    training.step()
    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20)
    engine.guard(training.optimizer)
    held = held_copies(engine)
    expected = frozen(training.state())
    pending = saved(engine, training.state(), path="state.pt")
    change(training)
    held.let_go()
    error = pending.exception(60)
    engine.close()
    if error is None:
        assert_same(torch.load(tmp_path / "t" / "state.pt"), expected)
    else:
        assert isinstance(error, TornSnapshotError) and "weight" in str(error)
        assert not (tmp_path / "t").exists()


def test_load_state_dict_in_between_is_torn_and_named(tmp_path: Path, held_copies: Any) -> None:
    training = Training(OPTIMIZERS["adamw"])
    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20)
    engine.guard(training.optimizer)
    held = held_copies(engine)
    pending = saved(engine, training.model.state_dict(), path="model.pt")
    training.model.load_state_dict({k: v + 1 for k, v in training.model.state_dict().items()})
    held.let_go()
    with pytest.raises(TornSnapshotError, match=r"0\.weight") as caught:
        pending.result(60)
    assert "['0.weight']" in caught.value.tensors
    # The next checkpoint of the same engine is fine.
    engine.create("u")
    engine.save(training.model.state_dict(), "model.pt")
    engine.wait_snapshot()
    training.model.load_state_dict({k: v + 1 for k, v in training.model.state_dict().items()})
    engine.commit("u").result(60)
    engine.close()


def test_ema_updated_under_no_grad_is_eager(tmp_path: Path, held_copies: Any) -> None:
    training = Training(OPTIMIZERS["sgd"])
    ema = {k: v.clone() for k, v in training.model.state_dict().items()}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20) as engine:
        engine.guard(training.optimizer)
        held = held_copies(engine)
        expected = frozen(ema)
        engine.create("t")
        engine.save({"ema": ema, "model": training.model.state_dict()}, "m.pt")
        with torch.no_grad():
            for value in ema.values():
                value.add_(1) if not value.is_floating_point() else value.lerp_(torch.ones_like(value), 0.5)
        held.let_go()
        engine.commit("t").result(60)
    assert_same(torch.load(tmp_path / "t" / "m.pt")["ema"], expected)


def test_non_tensor_leaves_are_copied_at_save(tmp_path: Path) -> None:
    state: dict[str, Any] = {"step": 1, "list": [1, 2], "nested": {"lr": 0.5}, "w": torch.zeros(3)}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        engine.create("t")
        engine.save(state, "s.pt")
        state["step"] = 2
        state["list"].append(3)
        state["nested"]["lr"] = 0.1
        engine.commit("t").result(60)
    loaded = torch.load(tmp_path / "t" / "s.pt")
    assert (loaded["step"], loaded["list"], loaded["nested"]) == (1, [1, 2], {"lr": 0.5})


def test_changed_scalars_structures_and_shapes_between_saves(tmp_path: Path) -> None:
    """The cached plan must never be used for a state that it does not describe."""
    base = {"w": torch.zeros(100), "s": 1}
    states: list[Any] = [
        base,
        {**base, "s": 255},
        {**base, "s": 256},
        {**base, "s": 1 << 40},
        {**base, "s": True},
        {**base, "s": 1.5},
        {**base, "s": "text"},
        {**base, "w": torch.zeros(100, dtype=torch.int32)},
        {**base, "w": torch.zeros(10, 10)},
        {**base, "w": torch.zeros(10, 10).t()},
        {**base, "w": torch.zeros(200)[:100]},
        {**base, "extra": torch.ones(2)},
        {"w": base["w"], "v": base["w"]},
        {"w": torch.zeros(100), "v": torch.zeros(100)},
    ]
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        for k, state in enumerate(states * 2):
            saved(engine, state, f"t{k}")
    for k, state in enumerate(states * 2):
        assert (tmp_path / f"t{k}" / "s.pt").read_bytes() == torch_bytes(state), k


def test_state_eight_times_larger_than_staging(tmp_path: Path) -> None:
    state = {f"layer{k}": torch.randn(64 << 10) for k in range(32)}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=64 << 10) as engine:
        engine.create("big")
        engine.save(state, "s.pt")
        for tensor in state.values():
            tensor.zero_()
        pending = engine.commit("big")
        pending.result(120)
        assert pending.metrics.saves[0].mode == "streamed"
    loaded = torch.load(tmp_path / "big" / "s.pt")
    assert all(loaded[k].abs().sum() > 0 for k in state)


@pytest.mark.parametrize("is_guarded", [False, True])
def test_a_default_device_and_modes_do_not_reach_into_a_save(tmp_path: Path, is_guarded: bool) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    weight = torch.nn.Parameter(torch.ones(3, 5))
    state = {"w": weight, "many": [torch.full((7,), float(k)) for k in range(50)]}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20) as engine:
        if is_guarded:
            engine.guard(torch.optim.SGD([weight], lr=0.1))
        for tag, mode in (("device", torch.device("meta")), ("fake", FakeTensorMode())):
            with mode:
                engine.create(tag)
                engine.save(state, "s.pt")
                engine.save_bytes(b"hello", "b.txt")
                pending = engine.commit(tag)
            pending.result(60)
            assert_same(torch.load(tmp_path / tag / "s.pt"), state)


def test_bytes_that_are_left_from_an_earlier_save_are_those_of_this_one(tmp_path: Path) -> None:
    """Headers between payloads are not copied again where the memory still holds them: never those of another file, nor
    half of them.
    """
    torch.manual_seed(0)

    def tensors(count: int, size: int) -> dict[str, torch.Tensor]:
        return {f"t{k}": torch.randn(size + k % 3) for k in range(count)}

    kinds: list[Callable[[], Any]] = [
        lambda: tensors(300, 70),
        lambda: tensors(300, 71),
        lambda: {**tensors(40, 900), "step": torch.randn(1).item()},
        lambda: tensors(3, 9000),
        lambda: tensors(60, 7000),
    ]
    order = [0, 0, 1, 0, 2, 2, 2, 3, 2, 4, 0, 4, 2, 0, 3, 3, 1, 1, 0]
    saved: dict[str, bytes] = {}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=16384) as engine:
        for k, kind in enumerate(order):
            state = kinds[kind]()
            engine.create(f"t{k}")
            engine.save(state, "s.pt")
            saved[f"t{k}"] = torch_bytes(state)
            if k % 4 == 1:
                engine.commit(f"t{k}").result()
                # Restoring borrows the same memory for the old bytes.
                engine.load_into(kinds[kind](), f"t{k}/s.pt")
            elif k % 4 == 3:
                engine.abort(f"t{k}")
                del saved[f"t{k}"]
            else:
                engine.commit(f"t{k}")
    for tag, expected in saved.items():
        assert (tmp_path / tag / "s.pt").read_bytes() == expected, tag
    assert len(saved) == sum(k % 4 != 3 for k in range(len(order)))
