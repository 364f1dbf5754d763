"""File systems that are not what they seem: overlays, and a lying one in user space that stands for networks and
buckets.

Each case: a clear error of our tree or the right result; what was committed before is whole; nothing hangs past its
timeout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import logging
import os
import subprocess
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import Catalog, CheckpointError, CommitError, KeepLast, TagExistsError, load
from async_ckpt.format.manifest import Manifest
from async_ckpt.format.names import MANIFEST_NAME, private_name
from async_ckpt.host.process import current_owner
from async_ckpt.reading.errors import ReadError
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from tests.support.faulty_filesystem import FaultyFileSystem
from tests.support.lying_fuse import REQUESTS, Mounted, lying, why_not
from tests.support.making import begin
from tests.support.mounts import mounted, overlaid
from tests.support.processes import Talking

from .oracle import contents
from .workloads import TIMEOUT_S, Job, Told, make_engine, quiet, state

pytestmark = pytest.mark.wide


@pytest.fixture
def lies(tmp_path: Path) -> Iterator[Mounted]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with lying(tmp_path, "fuse.rclone") as mount:
        yield mount


@pytest.fixture
def root(lies: Mounted) -> Path:
    """A root on the lying file system that has told no lie yet, with the checkpoint "old" (version 1)."""
    root = lies.point / "root"
    with quiet(), make_engine(root) as engine:
        Job(engine, Told()).whole("old", 1)
    return root


@contextlib.contextmanager
def engine_on(root: Path, **config: object) -> Iterator[Job]:
    with quiet(), make_engine(root, **config) as engine:
        yield Job(engine, Told())


def finish(job: Job) -> None:
    """The open checkpoint "new"."""
    job.engine.save({"x": b"x" * 50_000}, "model.pt")
    job.engine.commit("new").result(TIMEOUT_S)


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


# Overlays.


@pytest.fixture
def lower(tmp_path: Path) -> Path:
    lower = tmp_path / "image"
    with make_engine(lower) as engine:
        for version, tag in enumerate(("a", "b", "c"), 1):
            Job(engine, Told()).whole(tag, version, ("model.pt", "sub/optim.pt"))
    return lower


def test_checkpoints_in_the_lower_layer_of_an_overlay_are_replaced_and_rotated(lower: Path, tmp_path: Path) -> None:
    """A directory there cannot be renamed (EXDEV): its files are linked, or it is taken apart with its manifest
    first."""
    with overlaid(lower, tmp_path) as root:
        with engine_on(root, overwrite="replace", retention=KeepLast(2)) as job:
            job.whole("b", 10, ("model.pt", "sub/optim.pt"))
            job.engine.delete("c")
            job.whole("d", 11)
        assert names(root) == ["b", "d"]
        assert contents(root) == {"b": 10, "d": 11}
        with engine_on(root) as job:
            job.whole("a", 12)
        assert contents(root) == {"a": 12, "b": 10, "d": 11}
    assert contents(lower) == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize("call", ["link", "rmdir", "unlink"])
def test_a_failed_replacement_in_a_lower_layer_loses_nothing(lower: Path, tmp_path: Path, call: str) -> None:
    with overlaid(lower, tmp_path) as root:
        fs = FaultyFileSystem()
        staging = begin(fs, root, "b", "replace")
        fs.fail_when(lambda op: op.name == call and op.path.startswith(str(root / "b")), errno.EIO)
        with pytest.raises(CommitError) as caught:
            transaction.publish(fs, staging, Manifest(staging.tag, 10, ()))
        fs.heal()
        transaction.abort(fs, staging)
        if contents(root).get("b") is None:
            assert caught.value.path is not None
            assert Path(caught.value.path).name.startswith(".aside.b.")
            subprocess.run(["rm", "-rf", str(root / "b")], check=True)
            os.rename(caught.value.path, root / "b")
        assert contents(root)["b"] == 2
        subprocess.run(f"rm -rf {root}/.aside.* {root}/.staging.*", shell=True, check=True)


@pytest.mark.leaves_staging
def test_a_sweep_keeps_an_old_tree_whose_name_something_else_has(tmp_path: Path) -> None:
    with make_engine(tmp_path) as engine:
        Job(engine, Told()).whole("a", 1)
    dead = dataclasses.replace(current_owner(), start_ticks=current_owner().start_ticks + 10**12)
    aside = tmp_path / private_name("aside", "a", dead, 0)
    os.rename(tmp_path / "a", aside)
    (tmp_path / "a").mkdir()
    (swept,) = transaction.sweep(FileSystem(), str(tmp_path))
    assert swept.action == "left"
    assert (aside / "model.pt").exists()
    (tmp_path / "a").rmdir()
    (swept,) = transaction.sweep(FileSystem(), str(tmp_path))
    assert swept.action == "restored"
    assert contents(tmp_path) == {"a": 1}


# What cannot be deleted.


@pytest.mark.parametrize("what", [".", "model.pt", MANIFEST_NAME])
def test_an_immutable_checkpoint_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str) -> None:
    """`chattr +i`: the directory keeps its name, or its files stay in one that was renamed; once it is lifted, the next
    commit deletes them."""
    with mounted("ext4", tmp_path, 64 << 20) as root:
        (root / "lost+found").rmdir()
        with make_engine(root, retention=KeepLast(1)) as engine:
            job = Job(engine, Told())
            job.whole("a", 1)
            subprocess.run(["chattr", "+i", root / "a" / what], check=True)
            for version, tag in enumerate(("b", "c"), 2):
                job.whole(tag, version)
            assert contents(root) | {"a": 1} == {"a": 1, "c": 3}
            for folder in {root / "a", *root.glob(".trash.*")}:
                subprocess.run(["chattr", "-f", "-R", "-i", folder], check=False)
            job.whole("d", 4)
        assert "cannot be deleted now" in "".join(record.message for record in caplog.records)
        assert names(root) == ["d"]
        assert contents(root) == {"d": 4}


# What is said at the start.


def warned(root: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with pytest.warns(RuntimeWarning, match="promised") as caught:
        transaction.make_root(FileSystem(), str(root))
    assert len(caught) == 1
    logged = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert logged == [str(caught[0].message)]
    assert names(root) == []
    return logged[0]


def test_one_warning_names_the_mount_and_what_was_found(lies: Mounted, caplog: pytest.LogCaptureFixture) -> None:
    root = lies.point / "root"
    assert "fuse.rclone: atomic and durable renames are not promised there; nothing else was found" in warned(
        root, caplog
    )
    lies.lie(rename="replaces")
    assert "a rename replaces a directory that is not empty" in warned(root, caplog)
    lies.lie(ignored=["truncate"])
    assert "cannot be shortened" in warned(root, caplog)
    lies.lie(identity="unstable")
    assert "change their numbers" in warned(root, caplog)
    lies.lie(errors={"RENAME2": errno.EINVAL})
    assert "RENAME_NOREPLACE" in warned(root, caplog)
    lies.lie(rename="no flags")
    assert "nothing else was found" in warned(root, caplog), "what is not empty is refused all the same"
    lies.lie(errors={"MKDIR": errno.EACCES})
    assert "could not be tried out" in warned(root, caplog)


def test_a_file_system_is_tried_out_once(lies: Mounted) -> None:
    fs = FileSystem()
    with pytest.warns(RuntimeWarning, match=r"fuse\.rclone"):
        transaction.make_root(fs, str(lies.point / "a"))
    transaction.make_root(fs, str(lies.point / "b"))
    transaction.make_root(fs, str(lies.point / "a"))


def test_local_file_systems_are_not_tried_out(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transaction.make_root(FileSystem(), str(tmp_path))
        with mounted("btrfs", tmp_path, 128 << 20) as point:
            transaction.make_root(FileSystem(), str(point))


# Lies about renames.


@pytest.mark.parametrize("rename", ["replaces", "no flags", ""])
@pytest.mark.parametrize("code", [0, errno.EINVAL, errno.ENOSYS, errno.ENOTEMPTY])
def test_replacing_and_rotating_whatever_renames_do(lies: Mounted, root: Path, rename: str, code: int) -> None:
    if code == errno.ENOTEMPTY and not rename:
        pytest.skip("an honest file system does not say so of a free name")
    lies.lie(rename=rename, errors={"RENAME2": code} if code and code != errno.ENOTEMPTY else {})
    with engine_on(root, overwrite="replace", retention=KeepLast(2)) as job:
        job.whole("old", 2)
        job.whole("new", 3)
        job.whole("new", 4)
        job.whole("newer", 5)
        job.engine.delete("newer")
    assert contents(root) == {"new": 4}
    assert names(root) == ["new"]


WRITER = """
import sys
from pathlib import Path
from async_ckpt import CheckpointError
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from tests.support.making import publish, stage
fs, root = FileSystem(), Path(sys.argv[1])
transaction.make_root(fs, str(root))
print("ready", flush=True)
for line in sys.stdin:
    files, staging = {"which": line.encode()}, None
    try:
        staging = stage(fs, root, "t", files)
        if line == "hold\\n":
            print("holds", flush=True)
            sys.stdin.readline()
        publish(fs, staging, files)
        print("committed", flush=True)
    except CheckpointError as error:
        if staging is not None:
            transaction.abort(fs, staging)
        print(type(error).__name__, flush=True)
"""


@pytest.mark.parametrize("how", ["replaces", "no flags"])
def test_of_several_writers_of_a_tag_one_wins_or_all_are_refused(lies: Mounted, root: Path, how: str) -> None:
    lies.lie(rename=how)
    with contextlib.ExitStack() as ended:
        writers = [ended.enter_context(Talking(WRITER, root)) for _ in range(3)]
        for writer in writers:
            assert writer.hear() == "ready"
        for version, writer in enumerate(writers, 10):
            writer.say(str(version))
        told = [writer.hear() for writer in writers]
    won = [version for version, line in enumerate(told, 10) if line == "committed"]
    assert set(told) <= {"committed", "TagExistsError", "CommitError"}
    assert len(won) <= 1
    if won:
        assert (root / "t" / "which").read_text() == f"{won[0]}\n"
    assert sorted(Catalog(root).tags()) == ["old", *(["t"] if won else [])]
    assert how == "replaces" or won


def test_where_a_rename_replaces_a_tag_that_another_process_has_open_is_refused(lies: Mounted, root: Path) -> None:
    lies.lie(rename="replaces")
    with engine_on(root) as job:
        with Talking(WRITER, root) as other:
            assert other.hear() == "ready"
            other.say("hold")
            assert other.hear() == "holds"
            with pytest.raises(TagExistsError, match="another process has tag 't' open"):
                job.engine.create("t")
            other.kill()
        job.whole("t", 5)
    transaction.sweep(FileSystem(), str(root))
    assert contents(root)["t"] == 5


# Other lies, and errors.


@pytest.mark.parametrize(
    ("lie", "io_mode"),
    [
        ({"ignored": ["truncate"]}, "direct"),
        ({"ignored": ["truncate"]}, "buffered"),
        ({"ignored": ["fsync"]}, "buffered"),
        # The file system has no such call, as CIFS.
        ({"errors": {"FSYNCDIR": errno.EINVAL}}, "buffered"),
    ],
    ids=str,
)
def test_what_is_ignored_or_cannot_be_asked_for_is_no_failure(
    lies: Mounted, root: Path, lie: dict[str, Any], io_mode: str
) -> None:
    lies.lie(**lie)
    with engine_on(root, io_mode=io_mode) as job:
        job.whole("new", 2)
    assert contents(root) == {"old": 1, "new": 2}


@pytest.mark.parametrize("io_mode", ["direct", "buffered"])
def test_files_that_change_their_numbers(lies: Mounted, root: Path, io_mode: str) -> None:
    lies.lie(identity="unstable")
    with engine_on(root, overwrite="replace", retention=KeepLast(1), io_mode=io_mode) as job:
        job.whole("new", 2)
        job.whole("new", 3)
        assert job.engine.latest() == "new"
    assert contents(root) == {"new": 3}


@pytest.mark.parametrize("late", [["RENAME2"], pytest.param(list(REQUESTS.values()), marks=pytest.mark.slow)], ids=len)
def test_answers_that_take_five_seconds_are_no_failure(lies: Mounted, root: Path, late: list[str]) -> None:
    with engine_on(root, backpressure_timeout_s=3600.0, close_timeout_s=3600.0) as job:
        lies.lie(latency_s=5.0, late=late)
        began = time.monotonic()
        job.engine.create("new")
        job.engine.save(state(2), "model.pt")
        job.engine.commit("new", metadata={"step": 2}).result(3600.0)
        assert time.monotonic() - began > 4.0
        lies.lie()
    assert contents(root) == {"old": 1, "new": 2}


OFTEN = [
    ("WRITE", "ESTALE"), ("WRITE", "EDQUOT"), ("FSYNC", "EIO"), ("FSYNCDIR", "EIO"), ("RENAME2", "ESTALE"),
    ("RENAME2", "ENOTCONN"), ("CREATE", "ESTALE"), ("GETATTR", "EIO"),
]  # fmt: skip
REST = [
    pytest.param(request, code, marks=pytest.mark.slow)
    for request in ("LOOKUP", "GETATTR", "SETATTR", "MKDIR", "UNLINK", "RMDIR", "OPEN", "READ", "WRITE", "STATFS",
                    "RELEASE", "FSYNC", "FLUSH", "OPENDIR", "READDIR", "RELEASEDIR", "FSYNCDIR", "CREATE", "RENAME2")
    for code in ("ESTALE", "ENOTCONN", "EIO", "EINVAL", "EPERM", "EACCES")
    if (request, code) not in OFTEN
]  # fmt: skip


@pytest.mark.leaves_staging
@pytest.mark.parametrize(("request_name", "code"), [*OFTEN, *REST])
def test_an_error_is_told_and_nothing_is_lost(lies: Mounted, root: Path, request_name: str, code: str) -> None:
    with engine_on(root) as job:
        job.engine.create("new")
        lies.lie(errors={request_name: getattr(errno, code)})
        if (request_name, code) in OFTEN:
            with pytest.raises(CheckpointError) as caught:
                finish(job)
            assert isinstance(caught.value, OSError)
            assert caught.value.errno == getattr(errno, code)
        else:
            with contextlib.suppress(CheckpointError):
                finish(job)
        lies.lie()
        seen = Catalog(root).tags()
        assert seen in (["old"], ["old", "new"])
        if "new" in seen:
            assert load(root / "new" / "model.pt") == {"x": b"x" * 50_000}
            job.engine.delete("new")
        job.whole("newer", 3)
    assert contents(root) == {"old": 1, "newer": 3}


@pytest.mark.parametrize("request_name", ["READ", "OPEN", "GETATTR", "LOOKUP", "OPENDIR"])
def test_a_server_in_trouble_is_no_damage(lies: Mounted, root: Path, request_name: str) -> None:
    """ESTALE passes: to call the checkpoint damaged would make a training begin anew."""
    lies.lie(errors={request_name: errno.ESTALE})
    with pytest.raises(ReadError, match="Stale"):
        load(root / "old" / "model.pt")
    with pytest.raises(OSError, match="Stale"):
        Catalog(root).latest()
    lies.lie()
    assert Catalog(root).latest() == "old"


@pytest.mark.leaves_staging
def test_a_server_that_goes_away_is_an_error_in_bounded_time(lies: Mounted, root: Path) -> None:
    began = time.monotonic()
    with quiet():
        engine = make_engine(root, close_timeout_s=5.0)
        engine.create("new")
        lies.kill()
        with pytest.raises(CheckpointError, match="connected"):
            finish(Job(engine, Told()))
        with contextlib.suppress(CheckpointError):
            engine.close()
    assert time.monotonic() - began < TIMEOUT_S
    assert contents(lies.real / "root") == {"old": 1}


HANG = """
import sys, time, warnings
warnings.simplefilter("ignore")
from tests.faults.workloads import Job, Told, make_engine
engine = make_engine(sys.argv[1], close_timeout_s=2.0)
engine.create("new")
print("open", flush=True)
sys.stdin.readline()
engine.save({"x": b"x" * 50_000}, "model.pt")
pending = engine.commit("new")
try:
    pending.result(1.0)
except TimeoutError as error:
    print("waits", flush=True)
try:
    engine.close()
except TimeoutError as error:
    print("closed", flush=True)
"""


@pytest.mark.parametrize(
    "hanging",
    [pytest.param([name], id=name, marks=pytest.mark.slow) for name in ("WRITE", "FSYNC", "RENAME2")]
    + [pytest.param(list(REQUESTS.values()), id="every request")],
)
@pytest.mark.leaves_staging
def test_a_disk_that_hangs_keeps_nobody_for_longer_than_the_timeouts(
    lies: Mounted, root: Path, hanging: list[str]
) -> None:
    with Talking(HANG, root) as job:
        assert job.hear() == "open"
        lies.lie(hangs=hanging)
        began = time.monotonic()
        try:
            job.say("go on")
            assert [job.hear(), job.hear()] == ["waits", "closed"]
            assert time.monotonic() - began < TIMEOUT_S
        finally:
            lies.kill()
    assert contents(lies.real / "root")["old"] == 1
