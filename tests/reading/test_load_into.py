"""`load_into`: existing tensors get exactly the file's values, or keep their own."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from torch.autograd import grad_mode

import async_ckpt
from async_ckpt import Catalog, ConfigError, CorruptCheckpointError, StateMismatchError, UnsupportedStateError
from async_ckpt.host.memory import region
from async_ckpt.metrics import listening_to_reads
from async_ckpt.reading import load as restore
from async_ckpt.reading import load_into as restore_into
from async_ckpt.reading import state_tree
from async_ckpt.reading.scatter import Rollback, Scatter
from async_ckpt.reading.state_tree import flatten
from tests.faults.interrupts import Interrupter, unraisable_forgotten

from ..support.comparing import torch_bytes
from .committed import commit
from .faulty import FaultyFileSystem
from .states import plain, torch_only, trained, zeroed


def pickled_deep(state: object) -> bytes:
    """`torch_bytes` of what is nested deeper than the recursion limit allows a pickler to go."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(torch_bytes(state)))
    limit, size = sys.getrecursionlimit(), threading.stack_size(256 << 20)
    sys.setrecursionlimit(100_000)
    try:
        thread.start()
        thread.join()
    finally:
        sys.setrecursionlimit(limit)
        threading.stack_size(size)
    return found[0]


def tensors(state: object) -> dict[str, torch.Tensor]:
    return {path: leaf for path, leaf in flatten(state) if isinstance(leaf, torch.Tensor)}


@pytest.fixture(params=["held", "read twice", "half held", "streamed"])
def atomic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_blocks: None) -> bool | str:
    """All ways to read: held in memory, too large for that, both, or straight into the targets."""
    budget = {"held": 1 << 40, "read twice": 0, "half held": 5 * 4096}.get(request.param, 0)
    monkeypatch.setattr(restore_into, "available_memory_bytes", lambda: budget)
    return "auto" if request.param != "streamed" else False


@pytest.mark.wide
def test_a_trained_state_is_restored_in_place(tmp_path: Path, atomic: bool | str) -> None:
    state = trained()
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(state)}, extent_bytes=4096)
    target = zeroed(state)
    before = {path: tensor.data_ptr() for path, tensor in tensors(target).items()}
    done = restore.load_committed_into(catalog, "a", "m.pt", target, atomic=atomic)
    assert done.mismatches == ()
    assert set(done.loaded) == set(before)
    assert {path: tensor.data_ptr() for path, tensor in tensors(target).items()} == before
    assert torch_bytes(target) == torch_bytes(state)
    assert done.state["step"] == 7
    assert done.state["model"]["0.weight"] is target["model"]["0.weight"]


def test_all_plain_kinds(tmp_path: Path, atomic: bool | str) -> None:
    state = plain()
    state["views"].pop()  # An expanded tensor cannot be written to; it has its own test.
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(state)}, extent_bytes=4096)
    target = zeroed(state)
    restore.load_committed_into(catalog, "a", "m.pt", target, atomic=atomic)
    assert torch_bytes(target) == torch_bytes(state)


def test_what_only_torch_can_read(tmp_path: Path) -> None:
    state = torch_only()
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(state)})
    target = {
        "sparse": torch.zeros(4, 4).to_sparse(),
        "conj": torch.zeros(1, dtype=torch.complex64),
        "plain": torch.zeros(40_000),
    }
    done = restore.load_committed_into(catalog, "a", "m.pt", target)
    assert torch.equal(target["sparse"].to_dense(), torch.eye(4))
    assert target["conj"].item() == 1 - 2j
    assert torch.equal(target["plain"], state["plain"])
    assert done.state["set"] == {1, 2}


def test_targets_of_any_layout(tmp_path: Path, atomic: bool | str) -> None:
    image = torch.randn(2, 3, 4, 5)
    matrix = torch.randn(40, 30)
    state = {
        "to channels_last": image,
        "from channels_last": image.to(memory_format=torch.channels_last),
        "both": image.to(memory_format=torch.channels_last),
        "to transposed": matrix,
        "from transposed": matrix.t(),
        "strided": matrix[::2, 3:7],
        "into a slice": matrix,
        "conj target": torch.randn(5, dtype=torch.complex64),
        "neg target": torch.randn(5),
    }
    frame = torch.full((60, 50), 9.0)
    target = {
        "to channels_last": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "from channels_last": torch.zeros(2, 3, 4, 5),
        "both": torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "to transposed": torch.zeros(30, 40).t(),
        "from transposed": torch.zeros(30, 40),
        "strided": torch.zeros(20, 4),
        "into a slice": frame[10:50, 10:40],
        "conj target": torch.zeros(5, dtype=torch.complex64).conj(),
        "neg target": torch.zeros(5, dtype=torch.complex64).conj().imag,
    }
    assert target["neg target"].is_neg()
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(state)}, extent_bytes=4096)
    restore.load_committed_into(catalog, "a", "m.pt", target, atomic=atomic)
    for name, value in state.items():
        assert torch.equal(target[name].resolve_conj().resolve_neg(), value), name
    assert frame[:10].eq(9).all()
    assert frame[50:].eq(9).all()
    assert frame[:, :10].eq(9).all()
    assert frame[:, 40:].eq(9).all()


def test_tied_weights_into_tied_and_untied(tmp_path: Path) -> None:
    weight = torch.randn(100)
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"a": weight, "b": weight})})
    shared = torch.zeros(100)
    restore.load_committed_into(catalog, "a", "m.pt", {"a": shared, "b": shared})
    apart = {"a": torch.zeros(100), "b": torch.zeros(100)}
    restore.load_committed_into(catalog, "a", "m.pt", apart)
    for tensor in (shared, *apart.values()):
        assert torch.equal(tensor, weight)


def test_all_mismatches_are_listed_and_nothing_moves(tmp_path: Path) -> None:
    state = {
        "same": torch.ones(3),
        "shape": torch.ones(3),
        "dtype": torch.ones(3),
        "only file": torch.ones(1),
        "nest": [torch.ones(2)],
    }
    state |= {"meta": torch.ones(2), "expanded": torch.ones(3)}
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(state)})
    target = {
        "same": torch.zeros(3),
        "shape": torch.zeros(4),
        "dtype": torch.zeros(3, dtype=torch.int32),
        "only given": torch.zeros(1),
    }
    target |= {
        "nest": [torch.zeros(2), torch.zeros(1)],
        "meta": torch.zeros(2, device="meta"),
        "expanded": torch.zeros(1).expand(3),
    }
    with pytest.raises(StateMismatchError) as caught:
        restore.load_committed_into(catalog, "a", "m.pt", target)
    text = str(caught.value)
    for part in (
        "['shape']",
        "(3,)",
        "(4,)",
        "['dtype']",
        "int32",
        "['only given']",
        "['only file']",
        "['nest'][1]",
        "meta",
        "expanded",
    ):
        assert part in text
    assert len(caught.value.mismatches) == 7
    assert target["same"].eq(0).all()

    done = restore.load_committed_into(catalog, "a", "m.pt", target, strict=False)
    assert done.loaded == ("['same']", "['nest'][0]")
    assert done.mismatches == caught.value.mismatches
    assert target["same"].eq(1).all()
    # What had no place to go is in the returned structure, with its values.
    assert done.state["shape"].eq(1).all()
    assert done.state["only file"].eq(1).all()


def test_a_parameter_that_had_no_place_stays_a_parameter(tmp_path: Path) -> None:
    catalog = commit(
        tmp_path,
        "a",
        {
            "m.pt": torch_bytes(
                {"p": torch.nn.Parameter(torch.ones(2), False), "leaf": torch.ones(2, requires_grad=True)}
            )
        },
    )
    done = restore.load_committed_into(catalog, "a", "m.pt", {}, strict=False)
    assert isinstance(done.state["p"], torch.nn.Parameter)
    assert not done.state["p"].requires_grad
    assert done.state["leaf"].requires_grad


def test_tuples_are_rebuilt_around_the_given_tensors(tmp_path: Path) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"t": (1, torch.ones(2), (torch.ones(1), "x"))})})
    target = {"t": (None, torch.zeros(2), (torch.zeros(1), None))}
    done = restore.load_committed_into(catalog, "a", "m.pt", target)
    assert done.state["t"][0] == 1
    assert done.state["t"][2][1] == "x"
    assert done.state["t"][1] is target["t"][1]
    pair = namedtuple("pair", "a b")
    moved = state_tree.replace_leaves(pair(1, 2), {"[1]": 5})
    assert moved == pair(1, 5)


def test_damage_leaves_the_targets_alone(tmp_path: Path, atomic: bool | str) -> None:
    if not atomic:
        pytest.skip("only atomic loads promise this")
    data = bytearray(torch_bytes(trained()))
    catalog = commit(tmp_path, "a", {"m.pt": bytes(data)}, extent_bytes=4096)
    for at in range(0, len(data), 4096):
        damaged = bytearray(data)
        damaged[at + 5] ^= 1
        (tmp_path / "a/m.pt").write_bytes(damaged)
        target = zeroed(trained())
        with pytest.raises(CorruptCheckpointError):
            restore.load_committed_into(catalog, "a", "m.pt", target)
        assert all(tensor.eq(0).all() for tensor in tensors(target).values())


@pytest.mark.usefixtures("small_blocks")
def test_a_failing_read_leaves_the_targets_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained()
    commit(tmp_path, "a", {"m.pt": torch_bytes(state)}, extent_bytes=4096)
    faulty = FaultyFileSystem()
    catalog = Catalog(tmp_path, faulty)
    restore.load_committed_into(catalog, "a", "m.pt", zeroed(state))
    for k in range(faulty.num_reads):
        faulty.fail_at(k)
        target = zeroed(state)
        with pytest.raises(OSError, match=r"m\.pt"):
            restore.load_committed_into(catalog, "a", "m.pt", target, verify="off")
        assert all(tensor.eq(0).all() for tensor in tensors(target).values())


@pytest.mark.usefixtures("small_blocks")
def test_an_interrupted_load_leaves_the_targets_alone(tmp_path: Path) -> None:
    state = {"a": torch.arange(20_000.0), "b": torch.arange(20_000.0)}
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(state)}, extent_bytes=4096)
    shared = torch.full((20_000,), 7.0)
    # Both records, equal by value, go to the same memory: old bytes are set aside twice.
    target = {"a": shared, "b": shared}
    left = 0

    def interrupt(name: str, num_bytes: int, total: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt

    with listening_to_reads(interrupt):
        for stop_after in range(3, 40, 3):
            left = stop_after
            with pytest.raises(KeyboardInterrupt):
                restore.load_committed_into(catalog, "a", "m.pt", target)
            assert shared.eq(7).all()
    restore.load_committed_into(catalog, "a", "m.pt", {"a": target["a"], "b": torch.zeros(20_000)})
    assert torch.equal(shared, state["a"])


@pytest.mark.wide
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("again", [None, 0])
def test_wherever_interrupts_strike_no_thread_is_left_and_no_tensor_is_half_new(
    tmp_path: Path, again: int | None
) -> None:
    """At each step of the threads that read and of the roll-back; and once more, `again` calls later."""
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"w": torch.arange(5000.0)})}, extent_bytes=4096)
    target = torch.full((5000,), 7.0)
    within = ("threads/executor.py", "reading/scatter.py")

    def load(interrupter: Interrupter) -> None:
        with interrupter.watching():
            restore.load_committed_into(catalog, "a", "m.pt", {"w": target}, num_threads=2)

    counter = Interrupter(None, within=within)
    load(counter)
    for k in range(counter.num_steps):
        target.fill_(7)
        with contextlib.suppress(KeyboardInterrupt), unraisable_forgotten():
            load(Interrupter(k, again, within=within))
        assert target.eq(7).all() or torch.equal(target, torch.arange(5000.0)), f"step {k}"
        deadline = time.monotonic() + 10
        # One that was still starting cannot be joined yet.
        while any(thread.name.startswith("async-ckpt-read") for thread in threading.enumerate()):
            assert time.monotonic() < deadline, f"step {k}: a thread is left"


@pytest.mark.parametrize("again", [None, 3])
def test_wherever_interrupts_strike_copies_and_what_is_read_in_place_are_of_one_age(
    tmp_path: Path, again: int | None
) -> None:
    state = {"w": torch.arange(12.0), "copied": torch.arange(12.0).view(3, 4)}
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes(state)})
    target = {"w": torch.empty(12), "copied": torch.empty(4, 3).t()}
    # Also where a context of torch's is left.
    within = ("reading/load_into.py", str(grad_mode.__file__), str(torch.utils._contextlib.__file__))

    def load(interrupter: Interrupter) -> None:
        for tensor in target.values():
            tensor.fill_(7)
        with interrupter.watching():
            restore.load_committed_into(catalog, "a", "m.pt", target, num_threads=1, atomic=True)

    counter = Interrupter(None, within=within)
    load(counter)
    for k in range(counter.num_steps):
        with contextlib.suppress(KeyboardInterrupt), unraisable_forgotten():
            load(Interrupter(k, again, within=within))
        # torch's own context may have been interrupted while it was left.
        torch.set_grad_enabled(True)
        is_old = all(tensor.eq(7).all() for tensor in target.values())
        assert is_old or all(torch.equal(target[name], state[name]) for name in state), f"step {k}"


def test_a_thread_that_interrupts_have_left_writes_nothing_once_the_roll_back_has_begun() -> None:
    target = torch.full((4,), 7, dtype=torch.uint8)
    scatter = Scatter()
    scatter.add(0, 4, target.untyped_storage())
    scatter.freeze()
    rollback = Rollback(scatter, None, 4096)
    rollback(0, memoryview(bytearray(b"ab")))
    rollback.roll_back()
    rollback(2, memoryview(bytearray(b"cd")))
    assert target.eq(7).all()
    rollback.close()


@pytest.mark.usefixtures("small_blocks")
def test_failures_after_the_first_change_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Read twice, and the disk fails in the second pass: the one case in which the message is all that can be done.
    monkeypatch.setattr(restore_into, "available_memory_bytes", lambda: 0)
    state = {"w": torch.ones(40_000)}
    commit(tmp_path, "a", {"m.pt": torch_bytes(state)}, extent_bytes=4096)
    faulty = FaultyFileSystem()
    catalog = Catalog(tmp_path, faulty)
    restore.load_committed_into(catalog, "a", "m.pt", {"w": torch.zeros(40_000)}, num_threads=1)
    faulty.fail_at(faulty.num_reads - 2)
    target = {"w": torch.zeros(40_000)}
    with pytest.raises(OSError, match="partly overwritten"):
        restore.load_committed_into(catalog, "a", "m.pt", target, num_threads=1)
    assert target["w"].eq(1).any()
    # Who asks for more than that is told so before anything is read.
    faulty.fail_at(1 << 30)
    before = faulty.num_reads
    with pytest.raises(
        ConfigError, match=r"atomic=True sets 160000 bytes aside and 0 are available; no tensor was changed"
    ):
        restore.load_committed_into(catalog, "a", "m.pt", {"w": torch.zeros(40_000)}, num_threads=1, atomic=True)
    assert faulty.num_reads - before < 4


@pytest.mark.wide
@pytest.mark.usefixtures("small_blocks")
def test_atomic_holds_above_half_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restore_into, "available_memory_bytes", lambda: 170_000)
    state = {"w": torch.ones(40_000)}
    commit(tmp_path, "a", {"m.pt": torch_bytes(state)}, extent_bytes=4096)
    faulty = FaultyFileSystem()
    catalog = Catalog(tmp_path, faulty)
    restore.load_committed_into(catalog, "a", "m.pt", {"w": torch.zeros(40_000)}, atomic=True)
    for k in range(faulty.num_reads):
        faulty.fail_at(k)
        target = {"w": torch.zeros(40_000)}
        with pytest.raises(OSError, match="nothing was loaded"):
            restore.load_committed_into(catalog, "a", "m.pt", target, atomic=True)
        assert target["w"].eq(0).all()


@pytest.mark.parametrize("depth", [500, 900, 990, 1900])
def test_deep_structures_are_loaded(tmp_path: Path, depth: int) -> None:
    def nested(leaf: torch.Tensor) -> object:
        state: object = leaf
        for level in range(depth):
            state = [state] if level % 2 else {"d": state}
        return state

    catalog = commit(tmp_path, "a", {"m.pt": pickled_deep(nested(torch.ones(3)))})
    weight = torch.zeros(3)
    done = restore.load_committed_into(catalog, "a", "m.pt", nested(weight))
    assert weight.eq(1).all()
    assert len(done.loaded) == 1


def test_deeper_ones_are_refused_before_anything_is_overwritten(tmp_path: Path) -> None:
    state: object = torch.ones(3)
    for _ in range(3000):
        state = [state]
    catalog = commit(tmp_path, "a", {"m.pt": pickled_deep({"w": torch.ones(3), "deep": state})})
    weight = torch.zeros(3)
    with pytest.raises(UnsupportedStateError, match="nested deeper"):
        restore.load_committed_into(catalog, "a", "m.pt", {"w": weight}, strict=False)
    assert weight.eq(0).all()


class Refusing(tuple):
    """What cannot be made again from its items."""

    __slots__ = ()

    def __new__(cls, items: object = None) -> Refusing:
        if items is not None:
            raise ValueError("no")
        return super().__new__(cls, (torch.ones(2),))

    def __reduce__(self) -> tuple[object, ...]:
        return Refusing, ()


def test_what_is_returned_is_put_together_before_anything_is_overwritten(tmp_path: Path) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"w": torch.ones(3), "t": Refusing()})})
    target = {"w": torch.zeros(3), "t": (torch.zeros(2),)}
    with pytest.raises(ValueError, match="no"):
        restore.load_committed_into(catalog, "a", "m.pt", target, weights_only=False)
    assert target["w"].eq(0).all()  # type: ignore[attr-defined]


def test_autograd_sees_the_change(tmp_path: Path) -> None:
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"w": torch.ones(3)})})
    weight = torch.nn.Parameter(torch.zeros(3))
    loss = (weight * weight).sum()
    restore.load_committed_into(catalog, "a", "m.pt", {"w": weight})
    assert weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        frozen = torch.zeros(3)
    restore.load_committed_into(catalog, "a", "m.pt", {"w": frozen})
    assert frozen.eq(1).all()


def test_lent_memory_is_used_and_given_back(tmp_path: Path) -> None:
    data = bytearray(torch_bytes({"w": torch.arange(40_000)}))
    catalog = commit(tmp_path, "a", {"m.pt": bytes(data)})
    out: list[int] = []
    lent = 0

    def lend(num_bytes: int):
        nonlocal lent
        if lent == 3:
            return None
        lent += 1
        out.append(num_bytes)
        return region(1 << 20), lambda: out.remove(num_bytes)

    target = {"w": torch.zeros(40_000, dtype=torch.int64)}
    restore.load_committed_into(catalog, "a", "m.pt", target, lend=lend)
    assert torch.equal(target["w"], torch.arange(40_000))
    assert (lent, out) == (3, [])
    lent = 0
    data[100_000] ^= 1
    (tmp_path / "a/m.pt").write_bytes(data)
    with pytest.raises(CorruptCheckpointError):
        restore.load_committed_into(catalog, "a", "m.pt", target, lend=lend)
    assert out == []


def test_by_path(tmp_path: Path) -> None:
    commit(tmp_path, "a", {"m.pt": torch_bytes({"w": torch.ones(3)})})
    target = {"w": torch.zeros(3)}
    async_ckpt.load_into(target, tmp_path / "a/m.pt")
    assert target["w"].eq(1).all()
