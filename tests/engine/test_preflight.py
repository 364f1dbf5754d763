"""What an engine tries before its first save: errors at step 0 instead of hour 20, and nothing of it stays."""

from __future__ import annotations

import errno
import os
import subprocess
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, Catalog, KeepBest, KeepEvery, KeepLast, OutOfSpaceError, WriteError
from tests.support.faulty_filesystem import FaultyFileSystem
from tests.support.mounts import mounted
from tests.support.stepping import saved

MIB = 1 << 20
STATE = {"x": torch.zeros(MIB // 4)}


def make_engine(root: Path, **options: object) -> AsyncCheckpointEngine:
    return AsyncCheckpointEngine(root, staging_bytes=4 * MIB, chunk_bytes=MIB, **options)


def count_of_start(root: Path, **options: object) -> tuple[Counter[str], list[str]]:
    """The calls of an engine's start in a root that is there, and what it leaves."""
    root.mkdir(exist_ok=True)
    fs = FaultyFileSystem()
    make_engine(root, filesystem=fs, **options).close()
    calls = Counter(op.name for op in fs.operations if "preflight" in op.path + (op.dst or "") or op.path == str(root))
    return calls, os.listdir(root)


def test_one_real_write_and_sync_and_rename_of_which_nothing_stays(tmp_path: Path) -> None:
    calls, left = count_of_start(tmp_path / "root")
    assert {"mkdir": 1, "create": 1, "pwrite": 1, "rename": 1, "unlink": 1, "rmdir": 1}.items() <= calls.items()
    assert calls["fsync"] == 3 and left == []
    assert "create" not in count_of_start(tmp_path / "root", preflight=False)[0]


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *(("mkdir", errno.EROFS), ("create", errno.EACCES), ("pwrite", errno.ENOSPC), ("pwrite", errno.EDQUOT)),
        *(("fsync", errno.EIO), ("rename", errno.EPERM), ("unlink", errno.EPERM), ("rmdir", errno.ESTALE)),
    ],
)
@pytest.mark.leaves_staging
def test_a_disk_that_refuses_any_call_is_an_error_at_the_start(tmp_path: Path, name: str, code: int) -> None:
    fs = FaultyFileSystem()
    fs.fail_when(lambda op: op.name == name and ".preflight." in op.path + (op.dst or ""), code)
    with pytest.raises(WriteError, match="nothing can be saved") as told:
        make_engine(tmp_path, filesystem=fs)
    is_full = code in (errno.ENOSPC, errno.EDQUOT)
    assert told.value.errno == code and isinstance(told.value, OutOfSpaceError) == is_full
    # A start of another process sweeps what could not be deleted.
    make_engine(tmp_path).close()
    assert os.listdir(tmp_path) == []


def test_states_that_do_not_fit_are_refused_before_the_first_step(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, 3 * MIB) as root, make_engine(root) as engine:
        engine.prewarm(states={"x.pt": STATE})
        with pytest.raises(OutOfSpaceError, match="bytes are free: make room") as told:
            engine.prewarm(states={f"{k}.pt": STATE for k in range(4)})
        assert told.value.needed_bytes is not None and told.value.needed_bytes > 4 * MIB
        assert told.value.free_bytes is not None and told.value.free_bytes < 4 * MIB
        assert os.listdir(root) == []


def test_what_retention_will_keep_at_once_has_to_fit_too(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, int(3.5 * MIB)) as root:
        for num, fits in ((1, True), (2, True), (3, False)):
            context = nullcontext() if fits else pytest.raises(OutOfSpaceError, match="`retention` keeps so many")
            with make_engine(root, retention=KeepLast(num) | KeepBest("loss")) as engine, context:
                engine.prewarm(states={"x.pt": STATE})
        with make_engine(root, retention=KeepLast(2)) as engine:
            for tag in "ab":
                saved(engine, STATE, tag, path="x.pt").result(60)
            # Those that are there count: one more comes.
            engine.prewarm(states={"x.pt": STATE})
    assert (KeepLast(3) | KeepEvery(10)).num_kept == 3 and KeepEvery(10).num_kept == 1


def test_a_start_reads_one_manifest_however_many_there_are(tmp_path: Path) -> None:
    with make_engine(tmp_path) as engine:
        for tag in ("a", "b", "c"):
            saved(engine, STATE, tag, path="x.pt").result(60)
    (tmp_path / "not a checkpoint").mkdir()
    fs = FaultyFileSystem()
    make_engine(tmp_path, filesystem=fs).close()
    opened = [op.path for op in fs.operations if op.path.endswith("manifest.json") and op.outcome == "ok"]
    assert set(opened) == {str(tmp_path / "c/manifest.json")}


@pytest.mark.parametrize("name", ["open", "read"])
def test_a_newest_checkpoint_that_cannot_be_read_now_ends_no_start(tmp_path: Path, name: str) -> None:
    """Only a warning depends on it, and the disk has just been written to; whoever reads it is told."""
    with make_engine(tmp_path) as engine:
        saved(engine, STATE, "a", path="x.pt").result(60)
    fs = FaultyFileSystem()
    fs.fail_when(lambda op: op.name == name and op.path.endswith("manifest.json"), errno.ESTALE)
    with make_engine(tmp_path, filesystem=fs) as engine:
        with pytest.raises(OSError, match="Stale"):
            engine.load("a/x.pt")
        fs.heal()
        assert engine.load("a/x.pt")["x"].numel() == MIB // 4


def test_a_start_beside_a_checkpoint_that_would_not_fit_again_warns(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, 3 * MIB) as root:
        with make_engine(root) as engine:
            saved(engine, {"x": torch.zeros(MIB // 2)}, "a", path="x.pt").result(60)
        with pytest.warns(RuntimeWarning, match="the newest checkpoint 'a' has 2"):
            engine = make_engine(root)
        # It can still be read.
        assert engine.load("a/x.pt")["x"].numel() == MIB // 2
        engine.close()


@pytest.mark.wide
def test_a_quota_is_asked(tmp_path: Path) -> None:
    with mounted("btrfs", tmp_path, 256 * MIB) as point:
        root = point / "runs"
        for command in (["subvolume", "create", root], ["quota", "enable", point], ["qgroup", "limit", "8M", root]):
            done = subprocess.run(["btrfs", *map(str, command)], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no quota groups here: {done.stderr.strip()}")
        with make_engine(root) as engine:
            engine.prewarm(states={"x.pt": STATE})
            with pytest.raises(OutOfSpaceError, match="quota is used up") as told:
                engine.prewarm(states={f"{k}.pt": STATE for k in range(12)})
            assert told.value.errno == errno.EDQUOT and os.listdir(root) == []
            # There is room on the disk itself.
            assert Catalog(root).tags() == [] and os.statvfs(root).f_bavail * os.statvfs(root).f_frsize > 100 * MIB
