"""Changes that torch's version counters do not see, each with what happens: the Caveats of the README, as tests.

An eager save has copied everything when it returns. A guarded one may still have to: content probes then see the change
of a whole tensor, and not a few numbers in the middle of a large one, unless `wait_snapshot` comes first.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, TornSnapshotError

SIZE = 5000
Change = Callable[[torch.Tensor], Any]


def _raw_pointer(weight: torch.Tensor) -> None:
    (ctypes.c_float * SIZE).from_address(weight.data_ptr())[:] = [9.0] * SIZE


def _other_storage(weight: torch.Tensor) -> None:
    # What the saved tensor was stays as it is, under its own storage.
    with torch.no_grad():
        weight.set_(torch.full((SIZE,), 9.0))  # type: ignore[call-overload]


def _inference(weight: torch.Tensor) -> None:
    with torch.inference_mode():
        weight.fill_(9.0)


UNCOUNTED: dict[str, Change] = {
    "tensor.data": lambda weight: weight.data.fill_(9.0),
    "a NumPy view": lambda weight: weight.detach().numpy().fill(9.0),
    "a DLPack view": lambda weight: torch.from_dlpack(torch.to_dlpack(weight.detach())).fill_(9.0),
    "a raw pointer": _raw_pointer,
    "bytes of the storage": lambda weight: weight.untyped_storage().copy_(torch.full((SIZE,), 9.0).untyped_storage()),
}
HARMLESS: dict[str, Change] = {
    "set_": _other_storage,
    "tensor.data = other": lambda weight: setattr(weight, "data", torch.full((SIZE,), 9.0)),
}


@pytest.fixture
def weight() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(SIZE))


def make_engine(root: Path) -> AsyncCheckpointEngine:
    return AsyncCheckpointEngine(root, staging_bytes=1 << 20, io_mode="buffered")


def saved(root: Path) -> list[float]:
    return torch.load(root / "t" / "s.pt")["w"].unique().tolist()


@pytest.mark.wide
@pytest.mark.parametrize("how", [*UNCOUNTED, *HARMLESS])
def test_an_eager_save_is_immune_once_it_has_returned(tmp_path: Path, weight: torch.nn.Parameter, how: str) -> None:
    with make_engine(tmp_path) as engine:
        engine.create("t")
        engine.save({"w": weight.detach()}, "s.pt")
        (UNCOUNTED | HARMLESS)[how](weight)
        engine.commit("t").result(60)
    assert weight[0] == 9 and saved(tmp_path) == [1]


@pytest.mark.parametrize("how", [*UNCOUNTED, *HARMLESS])
def test_a_guarded_save_is_immune_after_wait_snapshot(tmp_path: Path, weight: torch.nn.Parameter, how: str) -> None:
    with make_engine(tmp_path) as engine:
        optimizer = torch.optim.SGD([weight])
        engine.guard(optimizer)
        engine.create("t")
        engine.save({"w": weight.detach()}, "s.pt")
        engine.wait_snapshot()
        (UNCOUNTED | HARMLESS)[how](weight)
        pending = engine.commit("t")
        assert pending.metrics.saves[0].mode == "lazy"
        pending.result(60)
    assert weight[0] == 9 and saved(tmp_path) == [1]


@pytest.fixture
def save_and_change(
    tmp_path: Path, weight: torch.nn.Parameter, held_copies: Any
) -> Callable[[Change], BaseException | None]:
    """Saves the guarded weight, changes it before a byte was copied, and tells how the commit ended."""

    def run(change: Change) -> BaseException | None:
        optimizer = torch.optim.SGD([weight])
        engine = make_engine(tmp_path)
        engine.guard(optimizer)
        held = held_copies(engine)
        engine.create("t")
        engine.save({"w": weight.detach()}, "s.pt")
        change(weight)
        held.let_go()
        error = engine.commit("t").exception(60)
        engine.close()
        return error

    return run


@pytest.mark.parametrize("how", UNCOUNTED)
def test_a_guarded_save_without_wait_snapshot_is_torn(save_and_change: Any, how: str) -> None:
    error = save_and_change(UNCOUNTED[how])
    assert isinstance(error, TornSnapshotError) and error.tensors == ("['w']",)


def test_a_few_numbers_in_the_middle_are_not_seen(tmp_path: Path, save_and_change: Any) -> None:
    """A limit, not a wish: should this fail because the change is noticed now, the README is to be corrected."""
    assert save_and_change(lambda weight: weight.data[100:110].fill_(9.0)) is None
    assert saved(tmp_path) == [1, 9]


def test_giving_a_tensor_other_data_leaves_the_snapshot_right(
    tmp_path: Path, weight: torch.nn.Parameter, save_and_change: Any
) -> None:
    """The saved tensor keeps the storage that it had."""
    assert save_and_change(HARMLESS["tensor.data = other"]) is None
    assert weight[0] == 9 and saved(tmp_path) == [1]


def test_set_is_taken_for_a_change(save_and_change: Any) -> None:
    """It moves the counter, although the saved storage stays as it was: refused, to be on the safe side."""
    assert isinstance(save_and_change(HARMLESS["set_"]), TornSnapshotError)


def test_inference_tensors_have_no_counter(tmp_path: Path, held_copies: Any) -> None:
    """No optimizer can own them, so they are always copied eagerly."""
    with torch.inference_mode():
        weight = torch.ones(SIZE)
    with make_engine(tmp_path) as engine:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))])
        engine.guard(optimizer)
        held = held_copies(engine)
        engine.create("t")
        engine.save({"w": weight}, "s.pt")
        _inference(weight)
        held.let_go()
        engine.commit("t").result(60)
    assert weight[0] == 9 and saved(tmp_path) == [1]
