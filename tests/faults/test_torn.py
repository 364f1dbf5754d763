"""Training that goes on while lazy saves are copied, in every usual way: the right bytes, or TornSnapshotError."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, TornSnapshotError
from async_ckpt.snapshot.changes import TornCheck
from async_ckpt.snapshot.step_exclusion import StepExclusion
from tests.snapshot.test_snapshots import OPTIMIZERS, Training, assert_same, frozen
from tests.support.insides import commits_of
from tests.support.stepping import saved, until

from .torn import KINDS, sweep

pytestmark = pytest.mark.wide


def _scheduler(training: Training) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 1, 0.5)
    training.step()
    scheduler.step()


def _accumulate(training: Training) -> None:
    for _ in range(3):
        (training.model(training.data).square().mean() / 3).backward()
    training.optimizer.step()


def _ema(training: Training) -> None:
    with torch.no_grad():
        for parameter in training.model.parameters():
            parameter.lerp_(torch.ones_like(parameter), 0.1)


def _other_thread(training: Training) -> None:
    thread = threading.Thread(target=training.step)
    thread.start()
    thread.join(60)


CHANGES: dict[str, Callable[[Training], None]] = {
    "step": Training.step,
    "scheduler": _scheduler,
    "accumulation": _accumulate,
    "ema under no_grad": _ema,
    "load_state_dict": lambda t: t.model.load_state_dict({k: v + 1 for k, v in t.model.state_dict().items()}) and None,
    "another thread steps": _other_thread,
    "optimizer.load_state_dict": lambda t: t.optimizer.load_state_dict(t.optimizer.state_dict()),
}


@pytest.mark.parametrize("is_held", [False, True], ids=["copies run", "copies late"])
@pytest.mark.parametrize("guarded", [False, True], ids=["not guarded", "guarded"])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["adamw-foreach", "adamw-fused"])
def test_right_bytes_or_torn(
    tmp_path: Path, held_copies: Any, name: str, change: str, guarded: bool, is_held: bool
) -> None:
    training = Training(OPTIMIZERS[name])
    training.step()
    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20, chunk_bytes=16384)
    if guarded:
        engine.guard(training.optimizer)
    expected = frozen(training.state())
    held = held_copies(engine) if is_held else None
    pending = saved(engine, training.state(), path="state.pt")
    changing = threading.Thread(target=CHANGES[change], args=(training,))
    changing.start()
    if held is not None:
        # A guarded step waits for the copies, anything else has changed the tensors before them.
        changing.join(0.05)
        held.let_go()
    changing.join(60)
    error = pending.exception(60)
    engine.close()
    if error is None:
        assert_same(torch.load(tmp_path / "t" / "state.pt"), expected)
    else:
        assert isinstance(error, TornSnapshotError) and error.tensors
        assert guarded and change in ("ema under no_grad", "load_state_dict", "optimizer.load_state_dict")
        assert not (tmp_path / "t").exists()


def test_random_schedules() -> None:
    """A sample of ``python -m tests.faults.torn``, every kind of optimizer."""
    counts = sweep(7, num_ordered=4, num_free=0, stop=True)
    assert len(counts) == 2 * len(KINDS)
    assert sum(count.schedules for count in counts) == 8 * len(KINDS) and not any(count.wrong for count in counts)
    # Both ends were met: saves that went well, and changes behind the guard's back that were caught.
    assert sum(count.right for count in counts) > 10 * sum(count.torn for count in counts) > 0


def test_threads_that_step_and_save_as_fast_as_they_can() -> None:
    kinds = {name: KINDS[name] for name in ("adamw-foreach", "sgd-momentum-fused")}
    counts = sweep(7, num_ordered=0, num_free=1, stop=True, kinds=kinds)
    assert [count.right for count in counts if count.name.endswith("free")] == [20, 20]


@pytest.mark.parametrize(
    ("owner", "name"), [(StepExclusion, "begin"), (TornCheck, "compare_chunk")], ids=["no turns", "no probes"]
)
def test_the_schedules_find_a_guard_that_lacks_something(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """The test of the test."""
    monkeypatch.setattr(owner, name, lambda *_: None)
    counts = sweep(7, num_ordered=20, num_free=0, kinds={"adamw-foreach": KINDS["adamw-foreach"]})
    wrong = {count.name: count.wrong for count in counts}
    assert wrong["adamw-foreach, guarded"] > 0 and wrong["adamw-foreach, not guarded"] == 0


def test_a_change_after_the_copy_has_ended_tears_nothing(tmp_path: Path) -> None:
    """Its checkpoint was refused until it was published, however long ago the copy had ended."""
    weight = torch.nn.Parameter(torch.ones(1000))
    with torch.no_grad(), AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20) as engine:
        engine.guard(torch.optim.SGD([weight], lr=0.1))
        engine.create("t")
        engine.save({"w": weight}, "s.pt")
        copy = commits_of(engine).require_open("t").files["s.pt"].copy
        copy.copied.result(60)
        weight.add_(1)
        engine.commit("t").result(60)
    assert torch.equal(torch.load(tmp_path / "t" / "s.pt")["w"], torch.ones(1000))


def test_a_copied_tensor_is_let_go_before_its_checkpoint_is_committed(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(1000))
    with AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20) as engine:
        optimizer = torch.optim.SGD([weight], lr=0.1)
        engine.guard(optimizer)
        engine.create("t")
        engine.save({"w": weight}, "s.pt")
        alive = weakref.ref(weight)
        del weight, optimizer
        until(lambda: (gc.collect() and False) or alive() is None)
        engine.commit("t").result(60)
