"""Transactions: who wins, who may delete what, which modes things get, and what is said about it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from async_ckpt.errors import (
    CheckpointNotFoundError,
    CommitError,
    TagExistsError,
    TransactionStateError,
    UnsafePathError,
    UnsupportedStateError,
    WriteError,
)
from async_ckpt.format.manifest import Manifest
from async_ckpt.format.names import PrivateName, parse_private_name, private_name
from async_ckpt.host.process import current_owner
from async_ckpt.reading.catalog import Catalog
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from async_ckpt.storage.staged import State
from tests.support.faulty_filesystem import FaultyFileSystem

from ..support.making import NEW, OLD, begin, commit, content, private_names, publish, stage

FS = FileSystem()
OTHERS = dataclasses.replace(current_owner(), pid_namespace=1)


def test_commit_then_refuse_then_replace(tmp_path: Path) -> None:
    commit(tmp_path, "t", OLD)
    with pytest.raises(TagExistsError, match="overwrite='replace'"):
        begin(FS, tmp_path, "t", "refuse")
    assert content(tmp_path, "t") == OLD
    commit(tmp_path, "t", NEW, overwrite="replace")
    assert content(tmp_path, "t") == NEW
    assert private_names(tmp_path) == []


@pytest.mark.parametrize("kind", ["directory", "file", "link"])
def test_what_is_no_checkpoint_is_never_replaced_or_removed(tmp_path: Path, kind: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "manifest.json" if kind == "link" else precious / "thesis.txt").write_text("years of work")
    root = tmp_path / "root"
    root.mkdir()
    if kind == "directory":
        precious.rename(root / "t")
    elif kind == "file":
        (root / "t").write_text("years of work")
    else:
        (root / "t").symlink_to(precious)
    with pytest.raises(TagExistsError, match="not a checkpoint"):
        begin(FS, root, "t", "replace")
    with pytest.raises(CheckpointNotFoundError):
        transaction.remove(FS, str(root), "t")
    assert "years of work" in {p.read_text() for p in tmp_path.rglob("*") if p.is_file()}


def test_what_other_code_adds_before_the_commit_stays_beside_it(tmp_path: Path, caplog: Any) -> None:
    staging = stage(FS, tmp_path, "t", {**NEW, "own/a": b"saved"}, "replace")
    (tmp_path / "t/own/deep").mkdir(parents=True)
    for path, text in (("notes (1).txt", "added"), ("own/deep/b", "added"), ("own/a", "written over")):
        (tmp_path / "t" / path).write_text(text)
    (tmp_path / "t/link").symlink_to("notes (1).txt")
    publish(FS, staging, {**NEW, "own/a": b"saved"})
    assert content(tmp_path, "t") == {**NEW, "own/a": b"saved"} and private_names(tmp_path) == []
    assert (tmp_path / "t/own/deep/b").read_text() == (tmp_path / "t/link").read_text() == "added"
    assert "own/a and 0 others" in caplog.text and "gave way to what was saved" in caplog.text
    assert not Catalog(tmp_path).verify("t").problems


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "aside"])
def test_what_other_code_adds_to_the_checkpoint_that_is_replaced_stays(tmp_path: Path, exchange: bool) -> None:
    fs = FaultyFileSystem()
    fs.refuse_exchange = not exchange
    commit(tmp_path, "t", {**OLD, "gone": b"of the old one"})
    (tmp_path / "t/notes").write_text("of the old one")
    os.utime(tmp_path / "t/notes", ns=(1, 1))
    os.utime(tmp_path / "t/gone", ns=(1, 1))
    staging = stage(fs, tmp_path, "t", NEW, "replace")
    (tmp_path / "t/adapter").mkdir()
    (tmp_path / "t/adapter/weights").write_text("added")
    publish(fs, staging, NEW)
    assert content(tmp_path, "t") == NEW and private_names(tmp_path) == []
    assert (tmp_path / "t/adapter/weights").read_text() == "added"
    assert not (tmp_path / "t/notes").exists() and not (tmp_path / "t/gone").exists()


def test_a_checkpoint_with_a_damaged_manifest_is_replaced_as_a_whole(tmp_path: Path) -> None:
    commit(tmp_path, "t", {**OLD, "gone": b"of the old one"})
    staging = stage(FS, tmp_path, "t", NEW, "replace")
    for path in ("manifest.json", "gone"):
        (tmp_path / "t" / path).write_text("damaged")
    publish(FS, staging, NEW)
    assert content(tmp_path, "t") == NEW and not (tmp_path / "t/gone").exists()
    assert private_names(tmp_path) == []


@pytest.mark.parametrize("overwrite", ["refuse", "replace"])
def test_a_folder_without_a_manifest_is_an_obstacle_where_it_cannot_be_joined(tmp_path: Path, overwrite: str) -> None:
    fs = FaultyFileSystem()
    fs.refuse_exchange = True
    staging = stage(fs, tmp_path, "t", NEW, overwrite)
    (tmp_path / "t").mkdir()
    (tmp_path / "t/notes").write_text("added")
    with pytest.raises(TagExistsError):
        publish(fs, staging, NEW)
    transaction.abort(fs, staging)
    assert [path.name for path in tmp_path.rglob("*")] == ["t", "notes"]


def test_a_link_in_the_trash_is_unlinked_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    root = tmp_path / "root"
    root.mkdir()
    staging = stage(FS, root, "t", OLD)
    (Path(staging.path) / "link").symlink_to(precious)
    transaction.abort(FS, staging)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert private_names(root) == []


def test_an_abort_beside_a_replace_never_deletes_the_older_checkpoint(tmp_path: Path) -> None:
    commit(tmp_path, "t", OLD)
    looked, exchanged = threading.Event(), threading.Event()

    class Racing(FileSystem):
        """The abort has deleted a first file when the exchange comes, unless something keeps it from that."""

        def unlink(self, path: str) -> None:
            super().unlink(path)
            if threading.current_thread() is aborting:
                looked.set()
                exchanged.wait(20)

        def rename_exchange(self, one: str, other: str) -> None:
            aborting.start()
            looked.wait(0.2)
            super().rename_exchange(one, other)
            exchanged.set()

    fs = Racing()
    staging = stage(FS, tmp_path, "t", NEW, overwrite="replace")
    aborting = threading.Thread(target=lambda: transaction.abort(fs, staging))
    publish(fs, staging, NEW)
    aborting.join(60)
    assert content(tmp_path, "t") == NEW
    assert private_names(tmp_path) == []


def test_a_publish_that_was_given_up_does_not_rename(tmp_path: Path) -> None:
    commit(tmp_path, "t", OLD)
    started = threading.Event()

    class Racing(FileSystem):
        def create_file(self, path: str, data: bytes) -> None:
            super().create_file(path, data)
            aborting.start()
            while not staging.given_up:
                started.wait(0.001)

    fs = Racing()
    staging = stage(FS, tmp_path, "t", NEW, overwrite="replace")
    aborting = threading.Thread(target=lambda: transaction.abort(FS, staging))
    with pytest.raises(CommitError, match="given up"):
        publish(fs, staging, NEW)
    aborting.join(60)
    assert content(tmp_path, "t") == OLD
    assert private_names(tmp_path) == []


@pytest.mark.parametrize("num_writers", [2, 8])
def test_one_of_many_writers_wins(tmp_path: Path, num_writers: int) -> None:
    barrier = threading.Barrier(num_writers)
    outcomes: list[object] = [None] * num_writers

    def write(number: int) -> None:
        fs = FaultyFileSystem()
        files = {"a": str(number).encode() * 100}
        staging = stage(fs, tmp_path, "t", files)
        barrier.wait(20)
        try:
            publish(fs, staging, files)
            outcomes[number] = files
        except TagExistsError as error:
            transaction.abort(fs, staging)
            outcomes[number] = error

    threads = [threading.Thread(target=write, args=(n,)) for n in range(num_writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    winners = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    assert len(winners) == 1
    assert sum(isinstance(outcome, TagExistsError) for outcome in outcomes) == num_writers - 1
    assert content(tmp_path, "t") == winners[0]


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "aside"])
def test_readers_see_whole_checkpoints_beside_replaces_and_removals(fast_path: Path, exchange: bool) -> None:
    stop = threading.Event()
    failures: list[BaseException] = []
    commit(fast_path, "other", OLD)

    def write() -> None:
        fs = FaultyFileSystem()
        fs.refuse_exchange = not exchange
        try:
            for number in range(150):
                files = {"a": b"%d" % number * 2000, f"only-{number}": b"x"}
                commit(fast_path, "t", files, fs=fs, overwrite="replace", created=number + 10)
                if number % 5 == 0:
                    transaction.remove(fs, str(fast_path), "t")
                fs.operations.clear()
        except BaseException as error:  # noqa: BLE001 -- shown by the main thread
            failures.append(error)
        finally:
            stop.set()

    thread = threading.Thread(target=write)
    thread.start()
    catalog = Catalog(fast_path)
    num_seen = 0
    try:
        while not stop.is_set():
            assert catalog.latest() is not None
            with contextlib.suppress(CheckpointNotFoundError):
                report = catalog.verify("t", num_threads=1)
                assert report.ok, report.problems
                num_seen += 1
    finally:
        stop.set()
        thread.join(60)
    assert not failures, failures
    assert num_seen > 0


@pytest.mark.parametrize("umask", [0o000, 0o002, 0o007, 0o022, 0o027, 0o077])
@pytest.mark.parametrize("setgid", [0o2000, 0])
def test_modes_follow_the_umask_and_keep_the_group(tmp_path: Path, umask: int, setgid: int) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(setgid | 0o770)
    before = os.umask(umask)
    try:
        staging = stage(FS, root, "t", NEW)
        assert os.stat(staging.path).st_mode & 0o777 == 0o700
        publish(FS, staging, NEW)
    finally:
        os.umask(before)
    assert root.stat().st_mode & 0o7777 == setgid | 0o770
    for path in [root / "t", *(root / "t").rglob("*")]:
        mode = path.stat().st_mode & 0o7777
        expected = (setgid | 0o777 if path.is_dir() else 0o666) & ~umask
        assert mode == expected, (path, oct(mode))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two users")
def test_a_colleague_of_the_group_reads_and_rotates() -> None:
    """Two users of one group, umask 002, a set-group-id root: each deletes and replaces what the other has
    committed.
    """
    group, first, second = 4000, 4001, 4002

    def as_user(user: int, work: Callable[[], object]) -> None:
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.setgroups([group])
                os.setgid(user)
                os.setuid(user)
                os.umask(0o002)
                work()
                code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = Path(folder) / "root"
        root.mkdir()
        os.chown(root, first, group)
        root.chmod(0o2770)
        as_user(first, lambda: [commit(root, tag, NEW, created=k) for k, tag in enumerate(("a", "b", "c"))])
        as_user(second, lambda: transaction.remove(FS, str(root), "a"))
        as_user(second, lambda: commit(root, "b", OLD, overwrite="replace", created=9))
        as_user(first, lambda: commit(root, "b", NEW, overwrite="replace", created=10))
        assert sorted(os.listdir(root)) == ["b", "c"]
        assert content(root, "b") == NEW
        assert {path.stat().st_gid for path in root.rglob("*")} == {group}


def rubbish(fs: FileSystem, root: Path) -> list[tuple[str, str]]:
    return sorted((swept.tag, swept.action) for swept in transaction.sweep(fs, str(root), only_own=True))


@pytest.mark.leaves_staging
def test_what_cannot_be_deleted_is_trash_that_is_tried_again(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    commit(tmp_path, "t", OLD, fs=fs)
    commit(tmp_path, "u", OLD, fs=fs)
    fs.fail_when(lambda op: op.name == "unlink", errno.EPERM)
    commit(tmp_path, "t", NEW, fs=fs, overwrite="replace")
    with pytest.raises(WriteError):
        transaction.remove(fs, str(tmp_path), "u")
    assert sorted(name.split(".")[1:3] for name in private_names(tmp_path)) == [["trash", "t"], ["trash", "u"]]
    assert rubbish(fs, tmp_path) == [("t", "left"), ("u", "left")]
    fs.heal()
    assert rubbish(FS, tmp_path) == [], "another process' rubbish is left to a whole sweep"
    assert len(private_names(tmp_path)) == 2
    assert rubbish(fs, tmp_path) == [("t", "removed"), ("u", "removed")]
    assert os.listdir(tmp_path) == ["t"]
    assert content(tmp_path, "t") == NEW


def test_trash_is_deleted_only_after_its_renaming_is_durable(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    commit(tmp_path, "t", OLD, fs=fs)
    fs.fail_when(lambda op: op.name == "fsync" and op.path == str(tmp_path), errno.EIO)
    with pytest.raises(WriteError):
        transaction.remove(fs, str(tmp_path), "t")
    with pytest.raises(WriteError, match="nothing was deleted"):
        rubbish(fs, tmp_path)
    (left,) = private_names(tmp_path)
    assert (tmp_path / left / "model.bin").read_bytes() == OLD["model.bin"]
    fs.heal()
    assert rubbish(fs, tmp_path) == [("t", "removed")]


def test_a_failed_root_sync_is_unknown_and_deletes_nothing(tmp_path: Path) -> None:
    commit(tmp_path, "t", OLD)
    fs = FaultyFileSystem()
    staging = stage(fs, tmp_path, "t", NEW, "replace")
    fs.fail_when(lambda op: op.name == "fsync" and op.path == str(tmp_path), errno.EIO)
    with pytest.raises(CommitError, match="unknown") as caught:
        publish(fs, staging, NEW, created=2)
    assert caught.value.committed is None
    assert caught.value.step == "sync root"
    transaction.abort(fs, staging)
    assert content(tmp_path, "t") == NEW
    old = tmp_path / private_names(tmp_path)[0]
    assert (old / "model.bin").read_bytes() == OLD["model.bin"], "the old tree may be the one that survives"
    with pytest.raises(TransactionStateError):
        publish(fs, staging, NEW)
    assert [swept.action for swept in transaction.sweep(FS, str(tmp_path))] == ["removed"]


def test_a_rename_that_reports_failure_but_happened_is_unknown(tmp_path: Path) -> None:
    class Nfs(FileSystem):
        def rename_noreplace(self, src: str, dst: str) -> None:
            super().rename_noreplace(src, dst)
            raise OSError(errno.EIO, "the answer got lost")

    staging = stage(FS, tmp_path, "t", NEW)
    with pytest.raises(CommitError) as caught:
        publish(Nfs(), staging, NEW)
    assert caught.value.committed is None
    transaction.abort(FS, staging)
    assert content(tmp_path, "t") == NEW


@pytest.mark.parametrize("change", ["missing", "extra", "short", "link"])
def test_a_staging_tree_that_is_not_the_manifests_is_not_published(tmp_path: Path, change: str) -> None:
    staging = stage(FS, tmp_path, "t", OLD)
    path = Path(staging.path) / "model.bin"
    if change == "missing":
        path.unlink()
    elif change == "short":
        path.write_bytes(b"x")
    elif change == "link":
        path.unlink()
        path.symlink_to("/etc/hostname")
    else:
        (path.parent / "more").write_text("")
    with pytest.raises(CommitError, match=r"model\.bin|more"):
        publish(FS, staging, OLD)
    transaction.abort(FS, staging)
    assert os.listdir(tmp_path) == []


def test_states_are_enforced(tmp_path: Path) -> None:
    staging = stage(FS, tmp_path, "t", OLD)
    publish(FS, staging, OLD)
    assert staging.state is State.COMMITTED
    with pytest.raises(TransactionStateError):
        publish(FS, staging, OLD)
    transaction.abort(FS, staging)
    assert content(tmp_path, "t") == OLD
    given_up = stage(FS, tmp_path, "u", OLD)
    transaction.abort(FS, given_up)
    with pytest.raises(TransactionStateError):
        publish(FS, given_up, OLD)


def test_bad_metadata_is_refused_by_name(tmp_path: Path) -> None:
    staging = stage(FS, tmp_path, "t", OLD)
    with pytest.raises(UnsupportedStateError, match=r"metadata\['a'\]\[1\]"):
        transaction.publish(FS, staging, Manifest("t", 1, (), {"a": [1, object()]}))  # type: ignore[list-item]
    transaction.abort(FS, staging)


@pytest.mark.parametrize(
    "bad", ["", ".", "..", "a/b", "/a", "a\0b", "a\nb", ".hidden", "x" * 129, "tür", " a", "a ", "a\\b"]
)
def test_bad_tags(tmp_path: Path, bad: str) -> None:
    for call in (lambda: begin(FS, tmp_path, bad), lambda: transaction.remove(FS, str(tmp_path), bad)):
        with pytest.raises(UnsafePathError) as caught:
            call()
        assert str(caught.value).isascii()
        assert str(caught.value).isprintable()
    assert os.listdir(tmp_path) == []


def test_root_is_made_durably_and_its_mode_is_kept(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    root = tmp_path / "a" / "b"
    transaction.make_root(fs, str(root))
    steps = [(op.name, op.path) for op in fs.operations if op.name in ("mkdir", "fsync")]
    assert steps == [
        ("mkdir", str(tmp_path / "a")),
        ("fsync", str(tmp_path)),
        ("mkdir", str(root)),
        ("fsync", str(tmp_path / "a")),
    ]
    root.chmod(0o1777)
    transaction.make_root(fs, str(root))
    assert root.stat().st_mode & 0o7777 == 0o1777
    (root / "file").write_text("")
    with pytest.raises(WriteError):
        transaction.make_root(FS, str(root / "file"))


def test_a_root_that_cannot_be_looked_at_is_an_error_of_ours(tmp_path: Path) -> None:
    class Blind(FileSystem):
        def stat(self, path: str) -> Any:
            raise OSError(errno.EIO, "Input/output error", path)

    with pytest.raises(WriteError, match="checkpoint root") as caught:
        transaction.make_root(Blind(), str(tmp_path / "a"))
    assert caught.value.errno == errno.EIO
    assert not (tmp_path / "a").exists()


def test_root_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    transaction.make_root(FS, str(tmp_path / "link"))
    commit(tmp_path / "link", "t", OLD)
    commit(tmp_path / "link", "t", NEW, overwrite="replace")
    assert content(tmp_path / "real", "t") == NEW


def test_join_checks_the_name(tmp_path: Path) -> None:
    staging = stage(FS, tmp_path, "t", OLD)
    name = os.path.basename(staging.path)
    assert transaction.join(FS, str(tmp_path), "t", name) == staging.path
    for bad in ("../x", name + "/..", "t", name.replace(".t.", ".u.")):
        with pytest.raises(UnsafePathError):
            transaction.join(FS, str(tmp_path), "t", bad)
    transaction.abort(FS, staging)
    with pytest.raises(CheckpointNotFoundError):
        transaction.join(FS, str(tmp_path), "t", name)


# --- the sweep ---


def fake_left_over(root: Path, owner: object, kind: str = "staging", age_s: float = 0.0) -> Path:
    path = root / f".{kind}.t.{owner}.7"
    path.mkdir()
    (path / "data").write_text("x")
    when = path.stat().st_mtime - age_s
    os.utime(path, (when, when))
    return path


DEAD = dataclasses.replace(current_owner(), start_ticks=1)


@pytest.mark.parametrize(
    ("owner", "age_s", "swept"),
    [
        (current_owner(), 1e6, False),
        (DEAD, 0, True),
        (dataclasses.replace(DEAD, pid=2**22 + 5), 0, True),
        (OTHERS, 0, False),
        (OTHERS, 61, True),
        (dataclasses.replace(DEAD, boot="12345678"), 0, True),
        (dataclasses.replace(DEAD, boot="12345678", host="12345678"), 1e6, False),
        (dataclasses.replace(DEAD, host="12345678"), 0, True),
    ],
    ids=[
        "self",
        "pid reused",
        "pid gone",
        "other namespace",
        "other namespace, old",
        "rebooted",
        "other host",
        "renamed host",
    ],
)
def test_who_is_swept(fast_path: Path, owner: object, age_s: float, swept: bool) -> None:
    for kind in ("staging", "trash"):
        path = fake_left_over(fast_path, owner, kind, age_s)
        results = transaction.sweep(FS, str(fast_path))
        assert path.exists() is not swept
        assert [result.action for result in results if result.name == path.name] == ["removed" if swept else "left"]
        if path.exists():
            (path / "data").unlink()
            path.rmdir()


def test_a_locked_directory_is_never_swept(fast_path: Path) -> None:
    for owner in (DEAD, OTHERS):
        path = fake_left_over(fast_path, owner, age_s=1e6)
        lock = FS.lock(str(path))
        assert lock is not None
        assert [result.action for result in transaction.sweep(FS, str(fast_path))] == ["left"]
        lock.close()
        assert [result.action for result in transaction.sweep(FS, str(fast_path))] == ["removed"]


def test_a_live_process_is_not_swept_though_its_owner_looks_dead(fast_path: Path) -> None:
    writer = FaultyFileSystem()
    staging = stage(writer, fast_path, "t", OLD)
    assert [result.action for result in transaction.sweep(FS, str(fast_path))] == ["left"]
    publish(writer, staging, OLD)
    assert content(fast_path, "t") == OLD


@pytest.mark.parametrize(
    "name",
    [
        ".staging",
        ".staging.t",
        ".staging.t.x.1",
        ".staging.t.1-2-3-4.0",
        ".other.t.{}.1",
        "t",
        ".staging.t.{}.01",
        ".staging...{}.1",
    ],
)
def test_foreign_names_are_never_touched(fast_path: Path, name: str) -> None:
    path = fast_path / name.format(DEAD)
    path.mkdir()
    assert transaction.sweep(FS, str(fast_path)) == []
    assert path.exists()


def test_a_file_or_link_with_a_staging_name_is_left(fast_path: Path) -> None:
    (fast_path / f".staging.t.{DEAD}.1").write_text("")
    (fast_path / f".staging.t.{DEAD}.2").symlink_to(fast_path)
    assert [result.action for result in transaction.sweep(FS, str(fast_path))] == ["left", "left"]


KILLED_WRITER = """
import os, sys
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from async_ckpt.storage.staged import Destination, Staging
staging = transaction.begin(FileSystem(), Staging(Destination(sys.argv[1], "t"), "refuse"))
if sys.argv[2] == "fork" and os.fork() == 0:
    sys.stdin.read()
    staging.lock.close()
    os._exit(0)
print(staging.path, flush=True)
sys.stdin.readline()
"""


def test_a_killed_process_is_swept_and_a_stopped_one_is_not(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path), "plain"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        process.send_signal(19)
        assert [result.action for result in transaction.sweep(FS, str(tmp_path))] == ["left"]
        assert path.exists()
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        # Not reaped yet: a zombie is dead, too.
        assert [result.action for result in transaction.sweep(FS, str(tmp_path))] == ["removed"]
        process.wait()


def test_a_forked_child_of_a_killed_writer_keeps_the_lock_until_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path), "fork"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        process.kill()
        process.wait()
        first = transaction.sweep(FS, str(tmp_path))
        process.stdin.close()
        # The child holds the other end of the pipe until it exits.
        process.stdout.read()
        second = transaction.sweep(FS, str(tmp_path))
    assert [result.action for result in first] == ["left"]
    assert [result.action for result in second] == ["removed"]


def test_private_names_round_trip() -> None:
    for tag in ("t", "a.b.c", "step-1", "x" * 128, "1.2"):
        parts: Any = "aside", tag, current_owner(), 12
        name = private_name(*parts)
        assert parse_private_name(name) == PrivateName(name, *parts)
        assert len(name) < 255
