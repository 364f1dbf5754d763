"""Killed, or failed, at every single system call: the tag is old or new, never a part, and life goes on."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from async_ckpt.errors import CheckpointError, CommitError, WriteError
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from tests.support.faulty_filesystem import FaultyFileSystem, Killed

from ..support.making import NEW, OLD, commit, content, private_names


def no_exchange(fs: FaultyFileSystem) -> None:
    fs.refuse_exchange = True


def no_renameat2(fs: FaultyFileSystem) -> None:
    fs.refuse_exchange = fs.refuse_noreplace = True


def no_locks(fs: FaultyFileSystem) -> None:
    fs.refuse_locks = True


def plain(fs: FaultyFileSystem) -> None:
    pass


SCENARIOS = {
    "new tag": (False, "refuse", plain),
    "new tag, old kernel": (False, "refuse", no_renameat2),
    "new tag, no locks": (False, "refuse", no_locks),
    "replace": (True, "replace", plain),
    "replace, no exchange": (True, "replace", no_exchange),
    "replace, old kernel": (True, "replace", no_renameat2),
}


def prepare(fast_path: Path, name: str, has_old: bool) -> Path:
    root = fast_path / name
    root.mkdir()
    commit(root, "older", {"a": b"older"}, created=1)
    if has_old:
        commit(root, "t", OLD, created=2)
    return root


def check_and_go_on(root: Path, allowed: list[dict[str, bytes] | None], *, tag_may_be_aside: bool = False) -> None:
    """The oracle: whole before and after recovery, nothing left, and the next commit works."""
    assert content(root, "older") == {"a": b"older"}
    found = content(root, "t")
    assert found in allowed or (tag_may_be_aside and found is None)
    transaction.sweep(FileSystem(), str(root))
    assert private_names(root) == []
    recovered = content(root, "t")
    assert recovered in allowed
    if found is not None:
        assert recovered == found, "the sweep changed a committed checkpoint"
    commit(root, "t", {"next": b"next"}, overwrite="replace", created=9)
    assert content(root, "t") == {"next": b"next"}


def count_calls(fast_path: Path, has_old: bool, overwrite: str, limits: Callable[[FaultyFileSystem], None]) -> int:
    root = prepare(fast_path, "count", has_old)
    fs = FaultyFileSystem()
    limits(fs)
    commit(root, "t", NEW, fs=fs, overwrite=overwrite, created=3)
    fs.dispose()
    return fs.num_counted


@pytest.mark.wide
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_killed_at_every_call_of_a_commit(fast_path: Path, scenario: str) -> None:
    has_old, overwrite, limits = SCENARIOS[scenario]
    num_calls = count_calls(fast_path, has_old, overwrite, limits)
    assert num_calls > 20
    seen = set()
    for k in range(num_calls):
        for when in ("before", "during", "after"):
            root = prepare(fast_path, f"{k}-{when}", has_old)
            fs = FaultyFileSystem()
            limits(fs)
            fs.kill_at(k, when)  # type: ignore[arg-type]
            with pytest.raises(Killed):
                commit(root, "t", NEW, fs=fs, overwrite=overwrite, created=3)
            fs.dispose()
            seen.add(str(content(root, "t")))
            check_and_go_on(
                root, [OLD if has_old else None, NEW], tag_may_be_aside=limits in (no_exchange, no_renameat2)
            )
    assert len(seen) >= 2, "the sweep saw only one outcome: it did not reach the rename"


@pytest.mark.wide
@pytest.mark.parametrize(
    ("scenario", "code"),
    [(scenario, errno.EIO) for scenario in SCENARIOS]
    + [("replace", code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EMFILE, errno.EROFS)],
)
def test_error_at_every_call_of_a_commit(fast_path: Path, scenario: str, code: int) -> None:
    has_old, overwrite, limits = SCENARIOS[scenario]
    num_calls = count_calls(fast_path, has_old, overwrite, limits)
    for k in range(num_calls):
        root = prepare(fast_path, str(k), has_old)
        fs = FaultyFileSystem()
        limits(fs)
        fs.fail_at(k, code)
        caught: OSError | None = None
        try:
            commit(root, "t", NEW, fs=fs, overwrite=overwrite, created=3)
        except OSError as error:
            caught = error
        if caught is not None:
            assert isinstance(caught, CheckpointError)
            assert caught.errno == code
            unknown = isinstance(caught, CommitError) and caught.committed is None
            outcomes = [NEW] if unknown else [OLD if has_old else None]
        else:
            # Only what follows the last sync may fail in silence: unlocking, and deleting the old tree.
            failed = next(op for op in fs.operations if op.index == k)
            assert failed.name in ("unlink", "rmdir") or (failed.name in ("close", "flock")), failed
            outcomes = [NEW]
        fs.heal()
        fs.dispose()
        assert content(root, "t") in outcomes, (k, fs.operations[-1])
        # A process that failed and then dies is the hardest case for the sweep.
        fs.killed = True
        check_and_go_on(root, outcomes)


@pytest.mark.wide
def test_killed_at_every_call_after_an_error(fast_path: Path) -> None:
    num_calls = count_calls(fast_path, True, "replace", plain)
    for k in range(0, num_calls, 3):
        for later in range(1, 12, 2):
            root = prepare(fast_path, f"{k}-{later}", True)
            fs = FaultyFileSystem()
            fs.fail_at(k, errno.EIO)
            fs.kill_at(k + later)
            with contextlib.suppress(Killed, OSError):
                commit(root, "t", NEW, fs=fs, overwrite="replace", created=3)
            fs.dispose()
            fs.killed = True
            check_and_go_on(root, [OLD, NEW])


def crashed_root(fast_path: Path, name: str) -> Path:
    """One of each left-over: staging with files, trash, and an old checkpoint set aside whose final name is free."""
    root = prepare(fast_path, name, True)
    for tag, fault in (("other", "chmod"), ("t", "second rename")):
        fs = FaultyFileSystem()
        fs.refuse_exchange = True
        renames: list[str] = []

        def die(op: object, fs: FaultyFileSystem = fs, fault: str = fault, renames: list[str] = renames) -> None:
            if op.name == "rename":  # type: ignore[attr-defined]
                renames.append("x")
            if op.name == fault or (fault == "second rename" and len(renames) == 3):  # type: ignore[attr-defined]
                fs.die(op)  # type: ignore[arg-type]

        fs.before = die
        with pytest.raises(Killed):
            commit(root, tag, NEW, fs=fs, overwrite="replace", created=3)
        fs.dispose()
    fs = FaultyFileSystem()
    commit(root, "gone", OLD, fs=fs)
    fs.before = lambda op: fs.die(op) if op.name == "unlink" else None
    with pytest.raises(Killed):
        transaction.remove(fs, str(root), "gone")
    fs.dispose()
    return root


@pytest.mark.wide
def test_killed_at_every_call_of_the_sweep(fast_path: Path) -> None:
    root = crashed_root(fast_path, "count")
    assert sorted(name.split(".")[1] for name in private_names(root)) == ["aside", "staging", "staging", "trash"]
    fs = FaultyFileSystem()
    actions = sorted(swept.action for swept in transaction.sweep(fs, str(root)))
    assert actions == ["removed", "removed", "removed", "restored"]
    for k in range(fs.num_counted):
        root = crashed_root(fast_path, str(k))
        dying = FaultyFileSystem()
        dying.kill_at(k)
        with pytest.raises(Killed):
            transaction.sweep(dying, str(root))
        dying.dispose()
        assert content(root, "t") in (OLD, None)
        check_and_go_on(root, [OLD], tag_may_be_aside=True)
        assert content(root, "gone") is None
        assert content(root, "other") is None


def test_error_at_every_call_of_the_sweep_deletes_nothing_committed(fast_path: Path) -> None:
    fs = FaultyFileSystem()
    transaction.sweep(fs, str(crashed_root(fast_path, "count")))
    for k in range(fs.num_counted):
        root = crashed_root(fast_path, str(k))
        failing = FaultyFileSystem()
        failing.fail_at(k, errno.EIO)
        with contextlib.suppress(WriteError):
            transaction.sweep(failing, str(root))
        failing.dispose()
        failing.killed = True
        check_and_go_on(root, [OLD], tag_may_be_aside=True)


def test_nothing_is_deleted_before_the_root_is_synced(fast_path: Path) -> None:
    root = crashed_root(fast_path, "root")
    fs = FaultyFileSystem()
    transaction.sweep(fs, str(root))
    names = [op.name for op in fs.operations if op.name in ("rename", "fsync", "unlink", "rmdir")]
    assert names.index("fsync") < min(names.index("unlink"), names.index("rmdir"))
    assert names.index("fsync") > max(i for i, name in enumerate(names) if name == "rename")
    fs = FaultyFileSystem()
    transaction.remove(fs, str(root), "t")
    names = [op.name for op in fs.operations if op.name in ("rename", "fsync", "unlink", "rmdir")]
    assert names[:2] == ["rename", "fsync"]


def test_killed_or_failed_at_every_call_of_a_removal(fast_path: Path) -> None:
    root = prepare(fast_path, "count", True)
    fs = FaultyFileSystem()
    transaction.remove(fs, str(root), "t")
    names = [op.name for op in fs.operations if op.index >= 0]
    for k in range(fs.num_counted):
        for fault in ("kill", "error"):
            root = prepare(fast_path, f"{k}-{fault}", True)
            faulty = FaultyFileSystem()
            if fault == "kill":
                faulty.kill_at(k)
            else:
                faulty.fail_at(k, errno.EIO)
            # Nothing was written through the lock's descriptor: that its close failed need not be said.
            is_harmless = (names[k], fault) == ("close", "error")
            with contextlib.suppress(WriteError) if is_harmless else pytest.raises((Killed, WriteError)):
                transaction.remove(faulty, str(root), "t")
            faulty.dispose()
            faulty.killed = True
            check_and_go_on(root, [OLD, None])


def test_order_of_the_publish(fast_path: Path) -> None:
    """Manifest written and synced, directories deepest first, rename, root: in this order, each once."""
    root = prepare(fast_path, "root", True)
    fs = FaultyFileSystem()
    commit(root, "t", NEW, fs=fs, overwrite="replace", created=3)
    relevant = [op for op in fs.operations if op.name in ("create", "pwrite", "fsync", "chmod", "exchange", "unlink")]
    manifest = next(i for i, op in enumerate(relevant) if op.name == "create" and op.path.endswith("manifest.json"))
    steps = [(op.name, Path(op.path).name) for op in relevant[manifest:]]
    staging = Path(next(op.path for op in relevant if op.name == "exchange")).name
    assert [name for name, _ in steps[:4]] == ["create", "pwrite", "fsync", "chmod"]
    synced = [name for kind, name in steps[4:8] if kind == "fsync"]
    assert synced[-1] == staging
    assert synced.index("deep") < synced.index("other") < synced.index(staging)
    at = steps.index(("exchange", staging))
    assert steps[at + 1] == ("fsync", "root")
    assert all(kind == "unlink" for kind, _ in steps[at + 2 :])
    files = [op.path for op in relevant[:manifest] if op.name == "fsync"]
    assert len(files) == len(set(files)) == len(NEW)
