"""Bugs that the sweeps have found, each by name."""

from __future__ import annotations

import errno
import gc
import os
import random
import shutil
import stat
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from async_ckpt import (
    BackpressureTimeout,
    Catalog,
    CheckpointError,
    CommitError,
    ConfigError,
    KeepLast,
    OutOfSpaceError,
    PendingCommit,
    TornSnapshotError,
    WriteError,
    retention,
)
from async_ckpt.plan.plan import opaque_state
from async_ckpt.plan.planner import Planner
from async_ckpt.reading.scatter import Rollback
from async_ckpt.retention import RetentionPolicy
from async_ckpt.snapshot.arena import StagingArena, StagingChunk
from async_ckpt.snapshot.changes import TornCheck
from async_ckpt.snapshot.probes import ProbeMap
from async_ckpt.threads import executor
from tests.support.faulty_filesystem import FaultyFileSystem, Operation
from tests.support.insides import arena_of, commits_of, thread_of
from tests.support.stepping import saved

from .diskmodel import DiskModel
from .oracle import contents
from .workloads import TIMEOUT_S, Job, Told, faulty_filesystem, make_engine, quiet, state

pytestmark = pytest.mark.wide


def test_a_file_whose_clean_up_breaks_does_not_hang_its_commit(tmp_path: Path) -> None:
    """After a failed write, a close that raised something unforeseen left the commit pending for ever."""
    fs = faulty_filesystem()

    def unforeseen(op: object) -> None:
        if op.name == "close" and op.path.endswith("model.pt"):  # type: ignore[attr-defined]
            raise MemoryError("in close")

    with quiet(), make_engine(tmp_path, fs) as engine:
        fs.fail_when(lambda op: op.name == "pwrite", errno.EIO)
        fs.before = unforeseen
        pending = Job(engine, Told()).start("a", 1)
        assert isinstance(pending.exception(TIMEOUT_S), WriteError)
        fs.heal()
        fs.before = None
        Job(engine, Told()).whole("b", 2)
        assert arena_of(engine).num_taken == 0


def test_an_older_checkpoint_that_cannot_be_read_does_not_fail_a_new_commit(tmp_path: Path) -> None:
    """Its time was read to order the new one after it, and the plain OSError of that became the commit's."""
    fs = faulty_filesystem()
    with make_engine(tmp_path, fs) as engine:
        Job(engine, Told()).whole("a", 1)
    with quiet(), make_engine(tmp_path, fs) as engine:
        fs.fail_when(lambda op: op.name == "open" and op.path.endswith("/a/manifest.json"), errno.EACCES)
        Job(engine, Told()).whole("b", 2)
        fs.heal()
        Job(engine, Told()).whole("c", 3)
        assert engine.tags() == ["a", "b", "c"]


def test_retention_that_cannot_read_is_told_and_tried_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A failed look at the checkpoints ended the training."""
    fs = faulty_filesystem()
    with make_engine(tmp_path, fs, retention=KeepLast(1)) as engine:
        job = Job(engine, Told())
        job.whole("a", 1)
        fs.fail_when(lambda op: op.name == "open" and op.path.endswith("/a/manifest.json"), errno.EMFILE)
        job.whole("b", 2)
        fs.heal()
        job.whole("c", 3)
        assert engine.tags() == ["c"]
    assert [record.message for record in caplog.records if "cannot be deleted" in record.message]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The error of a file in a sub-directory said neither which path failed nor that the disk is full."""
    fs = faulty_filesystem()
    with quiet(), make_engine(tmp_path, fs) as engine:
        fs.fail_when(lambda op: op.name == "mkdir" and op.path.endswith("/sub"), errno.ENOSPC)
        with pytest.raises(OutOfSpaceError) as caught:
            Job(engine, Told()).start("a", 1, ("sub/model.pt",)).result(TIMEOUT_S)
        assert caught.value.path is not None and caught.value.path.endswith("/sub")


def test_commits_that_nobody_asks_about_are_forgotten(tmp_path: Path) -> None:
    """Every successful commit whose result nobody looked at was remembered for as long as the engine lived."""
    with make_engine(tmp_path, overwrite="replace", max_pending_commits=1) as engine:
        commits_of(engine).num_remembered = 8
        known: list[weakref.ref[PendingCommit]] = []
        for k in range(30):
            known.append(weakref.ref(saved(engine, state(k, num_floats=10), f"t{k % 20}")))
        gc.collect()
        assert sum(pending() is not None for pending in known) <= 16


def test_many_commits_of_one_tag_do_not_wait_for_each_other_for_ever(tmp_path: Path) -> None:
    """Each waits for the one before; those that a later one had replaced in the books were not counted as pending."""
    fs = faulty_filesystem()
    gate = threading.Event()
    fs.before = lambda op: gate.wait(TIMEOUT_S) if op.name == "fsync" and op.path.endswith("model.pt") else None  # type: ignore[assignment, return-value]
    with (
        quiet(),
        make_engine(tmp_path, fs, overwrite="replace", max_pending_commits=2, backpressure_timeout_s=3.0) as engine,
    ):
        job = Job(engine, Told())
        pending = [job.start("a", 1), job.start("a", 2)]
        with pytest.raises(BackpressureTimeout):
            job.start("a", 3)
        gate.set()
        assert [p.exception(TIMEOUT_S) for p in pending] == [None, None]
        engine.commit("a").result(TIMEOUT_S)
    assert contents(tmp_path) == {"a": 3}


def replaced_at(fs: FaultyFileSystem, root: Path, call: str, path: str) -> Callable[[Operation], None]:
    """At this call another engine replaces "a" with version 9, once."""

    def replace(op: Operation) -> None:
        if (op.name, op.path) == (call, str(root / path)):
            fs.before = None
            with make_engine(root, overwrite="replace", sweep_on_start=False) as other:
                Job(other, Told()).whole("a", 9)

    return replace


@pytest.mark.parametrize("late", [False, True], ids=["before the look", "before the claim"])
def test_retention_spares_a_checkpoint_that_was_replaced_meanwhile(tmp_path: Path, late: bool) -> None:
    """Retention decided about the old "a" and deleted the new one, whose commit had just succeeded."""
    fs = faulty_filesystem()
    with make_engine(tmp_path, fs, retention=KeepLast(1)) as engine:
        job = Job(engine, Told())
        job.whole("a", 1)
        fs.before = replaced_at(fs, tmp_path, *(("flock", "a/manifest.json") if late else ("open", "b")))
        job.whole("b", 2)
        assert fs.before is None
        assert contents(tmp_path)["a"] == 9
        assert engine.tags()[-1] == "a"


def test_retention_deletes_nothing_for_a_newer_one_whose_name_is_not_durable_yet(tmp_path: Path) -> None:
    """Its root was not synced yet: after power loss it could be in staging again, and the older one gone."""
    root, before = tmp_path / "root", tmp_path / "before"
    fs = faulty_filesystem(keep_data=True)
    with quiet(), make_engine(root, fs) as engine:
        Job(engine, Told()).whole("reported", 1)
        shutil.copytree(root, before)
        first = len(fs.operations)
        fs.fail_when(lambda op: op.name == "fsync" and op.path == str(root), errno.EIO)
        assert isinstance(Job(engine, Told()).start("unknown", 2).exception(TIMEOUT_S), CommitError)
        fs.heal()
        assert engine.tags() == ["reported", "unknown"]
        retention.apply(fs, str(root), KeepLast(1))
    model = DiskModel(before)
    for op in fs.operations[first:]:
        op.path = op.path.replace(str(root), str(before))
        op.dst = op.dst and op.dst.replace(str(root), str(before))
        model.apply(op)
        for text, after in model.states(random.Random(1), 2):
            assert {"reported/manifest.json", "unknown/manifest.json"} & set(after), (
                f"after {op.name} {op.path}: {text}"
            )


def test_a_checkpoint_that_retention_spared_is_not_called_deleted(tmp_path: Path) -> None:
    """`prune` said so of a tag that another process had replaced meanwhile."""
    fs = faulty_filesystem()
    with make_engine(tmp_path) as engine:
        for version, tag in enumerate(("a", "b", "c"), 1):
            Job(engine, Told()).whole(tag, version)

    fs.before = replaced_at(fs, tmp_path, "flock", "a/manifest.json")
    decided = {decision.tag: decision.keep for decision in retention.apply(fs, str(tmp_path), KeepLast(1))}
    assert decided == {"a": True, "b": False, "c": True}
    assert contents(tmp_path) == {"a": 9, "c": 3}


def test_retention_spares_a_replacement_with_the_directory_number_of_what_it_replaced(tmp_path: Path) -> None:
    """Checkpoints were told apart by their inodes, and a new directory may well get the inode of a deleted one."""
    fs = faulty_filesystem()
    lstat = fs.lstat

    def same_number(path: str, **where: Any) -> os.stat_result:
        found = lstat(path, **where)
        return os.stat_result((found.st_mode, 1, *found[2:10])) if stat.S_ISDIR(found.st_mode) else found

    with make_engine(tmp_path, fs, retention=KeepLast(1)) as engine:
        job = Job(engine, Told())
        job.whole("a", 1)
        fs.lstat = same_number
        fs.before = replaced_at(fs, tmp_path, "open", "b")
        job.whole("b", 2)
        assert fs.before is None
    assert contents(tmp_path)["a"] == 9


def test_a_chunk_that_the_garbage_collector_finds_is_given_back() -> None:
    """An interrupted lazy save left its chunks in a cycle of traceback and frames; collected there, they were lost."""
    arena = StagingArena(2, 16384)
    held: list[object] = list(arena.try_reserve(2) or ())
    assert arena.num_taken == 2
    held.append(held)
    del held
    gc.collect()
    assert arena.num_taken == 0
    arena.close()


_ASKS: tuple[Callable[[StagingArena], object], ...] = (
    lambda arena: arena.num_taken == 0,
    lambda arena: arena.num_free == 2,
    lambda arena: arena.try_reserve(2),
    lambda arena: arena.acquire(0.0),
)


@pytest.mark.parametrize("ask", _ASKS)
def test_a_chunk_whose_end_is_interrupted_is_reclaimed(
    ask: Callable[[StagingArena], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second Ctrl-C at the very moment when a chunk was being given back lost it for the engine's life."""
    arena = StagingArena(2, 16384)
    held = arena.try_reserve(2)
    addresses = {chunk.address for chunk in held or ()}
    struck: list[str] = []

    def strike(frame: FrameType, event: str, arg: object) -> None:
        if frame.f_code.co_name == "__del__":
            struck.append(event)
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    sys.settrace(strike)  # type: ignore[arg-type]
    del held
    sys.settrace(None)
    assert len(struck) == 1  # A trace function that has raised is called no more.
    assert ask(arena)
    assert arena.num_free == 2 and {chunk.address for chunk in arena.try_reserve(2) or ()} == addresses
    arena.close()


def test_a_chunk_that_was_reclaimed_is_not_given_back_by_its_former_holder() -> None:
    """The garbage collector clears references to what it has found before it ends it."""
    arena = StagingArena(1, 16384)
    [former] = arena.try_reserve(1) or []
    arena._holders[former.address] = weakref.ref(StagingChunk(former.piece, arena))
    [present] = arena.try_reserve(1) or []
    assert present.address == former.address
    arena.release(former)
    assert arena.num_taken == 1 and present.is_held
    arena.release(present)
    assert arena.num_taken == 0
    arena.close()


@pytest.mark.leaves_staging
def test_closing_on_a_stuck_disk_fails_in_our_tree(tmp_path: Path) -> None:
    """Giving up a checkpoint never committed ended in the executor's own TimeoutError, after twice the time."""
    fs = faulty_filesystem()
    gate, reached = threading.Event(), threading.Event()
    fs.before = lambda op: (reached.set(), gate.wait(TIMEOUT_S)) if op.name == "pwrite" else None  # type: ignore[assignment, return-value]
    with quiet():
        engine = make_engine(tmp_path, fs, close_timeout_s=0.3, preflight=False)
        engine.create("a")
        engine.save(state(1), "model.pt")
        assert reached.wait(TIMEOUT_S)
        with pytest.raises(BackpressureTimeout):
            engine.close()
        gate.set()
        engine.close()


def test_a_close_that_fails_while_reading_leaks_no_descriptor(tmp_path: Path) -> None:
    """The root's descriptor failed to close, and the directory that had just been opened below it was forgotten."""
    fs = faulty_filesystem()
    with make_engine(tmp_path) as engine:
        Job(engine, Told()).whole("a", 1)
    fs.fail_when(lambda op: op.name == "close", errno.EIO)
    before = len(os.listdir("/proc/self/fd"))
    assert Catalog(tmp_path, fs).latest() == "a"
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_retention_policy_that_raises_does_not_fail_the_commit(tmp_path: Path) -> None:
    """A KeyError of a user's policy was raised by a commit that was durable."""

    class Broken(RetentionPolicy):
        def kept(self, checkpoints: Any, now_unix_ns: int) -> dict[str, str]:
            raise KeyError("loss")

    with quiet(), make_engine(tmp_path, retention=Broken()) as engine:
        job = Job(engine, Told())
        job.whole("a", 1)
        with pytest.raises(ConfigError, match="policy raised KeyError"):
            engine.create("b")
        assert engine.latest() == "a"


def test_an_old_checkpoint_is_read_into_tensors_after_the_writer_died(tmp_path: Path) -> None:
    """The idle chunks of a dead writer's arena were asked for, and its death raised."""
    with quiet():
        engine = make_engine(tmp_path)
        Job(engine, Told()).whole("a", 1)
        thread_of(commits_of(engine).pool).loop.call_soon_threadsafe(thread_of(commits_of(engine).pool).loop.stop)
        thread_of(commits_of(engine).pool).join(TIMEOUT_S)
        target = engine.load("a/model.pt")
        engine.load_into(target, "a/model.pt")
        with pytest.raises(CheckpointError, match="died"):
            engine.create("b")
        engine.close()


@pytest.mark.parametrize("others", [{}, {"buffer": torch.zeros(10)}], ids=["alone", "beside unguarded ones"])
def test_a_storage_that_is_freed_before_its_lazy_copy_is_torn(
    tmp_path: Path, held_copies: Any, others: dict[str, Any]
) -> None:
    """Its bytes were copied from where it no longer was."""
    weight = torch.nn.Parameter(torch.ones(1000))
    with quiet():
        engine = make_engine(tmp_path)
        optimizer = torch.optim.SGD([weight])
        engine.guard(optimizer)
        held = held_copies(engine)
        engine.create("a")
        engine.save({"w": weight.detach(), **others}, "s.pt")
        weight.untyped_storage().resize_(0)
        held.let_go()
        error = engine.commit("a").exception(TIMEOUT_S)
        engine.close()
    assert isinstance(error, TornSnapshotError) and "resized" in str(error)


def test_changes_in_the_order_of_streams_do_not_tear_a_snapshot() -> None:
    """A step on a GPU moves the counters at once, its kernels run behind the copies: the save failed as torn."""
    kept, changed = torch.ones(3), torch.ones(3)
    [plan] = [Planner().plan({"kept": kept, "changed": changed}, name="s.pt")]
    check = TornCheck(plan, (), ProbeMap(opaque_state(b"").plan, 4096, 1), [], frozenset())
    changed.add_(1)
    check.accept_changes()
    kept.add_(1)
    with pytest.raises(TornSnapshotError) as caught:
        check.check_torn()
    assert len(caught.value.tensors) == 1 and "changed" in caught.value.tensors[0]


def test_a_write_that_was_interrupted_does_not_hang_its_roll_back() -> None:
    """The count of writers stayed above zero, and `load_into` waited for ever."""

    class Interrupting:
        def targets(self, offset: int, num_bytes: int) -> list[tuple[int, int]]:
            return []

        def __call__(self, offset: int, view: memoryview) -> None:
            # As if the interrupt had struck before the write was counted out.
            rollback._writing.add(threading.get_ident())
            rollback._writing = _Stubborn(rollback._writing)
            raise KeyboardInterrupt

    class _Stubborn(set[int]):
        def discard(self, element: int) -> None:
            raise KeyboardInterrupt

    rollback = Rollback(Interrupting(), None, 4096)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        rollback(0, memoryview(b"x"))
    rollback.roll_back()
    rollback.close()


def test_a_thread_that_dies_before_it_begins_is_an_error_not_a_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the memory to begin, it never said that it had started."""
    monkeypatch.setattr(executor, "_START_TIMEOUT_S", 1)
    thread = threading.Thread(target=print, name="stillborn", daemon=True)
    thread._bootstrap = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="died before it began"):
        executor.start_thread(thread)
    assert thread not in threading.enumerate()


def test_targets_that_are_copied_to_get_their_old_values_back_too(tmp_path: Path) -> None:
    """After a failed `load_into`, tensors that are not contiguous kept what they had got so far."""

    class Refusing(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.Tensor.copy_ and refuses and args[0] is target["b"]:
                refuses.clear()
                raise RuntimeError("not now")
            return func(*args, **(kwargs or {}))

    refuses = [True]
    with quiet(), make_engine(tmp_path) as engine:
        saved(engine, {"a": torch.zeros(8, 8), "b": torch.zeros(8, 8), "c": torch.zeros(64)}, "a").result(TIMEOUT_S)
        target = {"a": torch.ones(8, 8).t(), "b": torch.ones(8, 8).t(), "c": torch.ones(64)}
        with pytest.raises(RuntimeError, match="not now"), Refusing():
            engine.load_into(target, "a/s.pt")
        assert not refuses
        assert all((tensor == 1).all() for tensor in target.values())
