"""A sample of `tests.faults.errors`, and disks that are truly full."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from async_ckpt import OutOfSpaceError, WriteError
from tests.support.insides import arena_of
from tests.support.making import private_names
from tests.support.mounts import mounted
from tests.support.stepping import saved

from .errors import sweep, sweep_short_writes
from .oracle import check_legal, contents
from .report import Extent
from .workloads import TIMEOUT_S, WORKLOADS, Folder, Job, Told, faulty_filesystem, make_engine, quiet, state

pytestmark = pytest.mark.wide


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "until healed"])
@pytest.mark.parametrize("name", WORKLOADS)
def test_an_error_at_a_sample_of_calls(folder: Folder, name: str, sticky: bool) -> None:
    row = sweep(folder, name, Extent(20, len(name)), num_writers=2, direct=sticky, sticky=sticky)
    assert row.operations > 25 and row.survived == row.injected == 20


def test_short_writes_change_nothing(folder: Folder) -> None:
    row = sweep_short_writes(folder, rounds=2)
    assert row.survived == row.injected == 18 and row.operations > 100


def test_a_failed_fsync_is_never_repeated(tmp_path: Path) -> None:
    fs = faulty_filesystem()
    with quiet(), make_engine(tmp_path, fs) as engine:
        job, told = Job(engine, Told()), Told()
        job.whole("a", 1)
        fs.fail_when(lambda op: op.name == "fsync" and op.path.endswith("model.pt"), errno.EIO)
        pending = job.start("b", 2)
        with pytest.raises(WriteError) as caught:
            pending.result(TIMEOUT_S)
        assert caught.value.errno == errno.EIO and str(caught.value.path).endswith("model.pt")
        fs.heal()
        assert pending.exception() is caught.value, "the failure does not stay"
        syncs = [op.path for op in fs.operations if op.name == "fsync" and ".staging.b." in op.path]
        assert len(syncs) == 1
        # Saved again, it is a new file in a new directory.
        told.attempt("a", 1)
        told.attempt("b", 2)
        job.whole("b", 2)
        assert [op.path for op in fs.operations if op.name == "fsync" and op.path.endswith("model.pt")][-1] not in syncs
    check_legal(contents(tmp_path), told)


@pytest.mark.parametrize(
    ("kind", "size_bytes"), [("tmpfs", 4 << 20), ("ext4", 16 << 20), ("xfs", 320 << 20), ("btrfs", 160 << 20)]
)
def test_a_disk_that_is_truly_full(tmp_path: Path, kind: str, size_bytes: int) -> None:
    """Refused with what was needed and what is free; nothing stays behind; works again after room was made."""
    with mounted(kind, tmp_path, size_bytes) as disk:
        root = disk / "run"
        with quiet(), make_engine(root, staging_bytes=4 << 20, chunk_bytes=1 << 18, io_mode="direct") as engine:
            job = Job(engine, Told())
            job.whole("small", 1)
            _fill(disk / "other", keep_bytes=1 << 20)
            with pytest.raises(OutOfSpaceError) as caught:
                saved(engine, state(2, num_floats=size_bytes // 8), "big").result(TIMEOUT_S)
            assert caught.value.errno == errno.ENOSPC
            assert caught.value.needed_bytes and caught.value.free_bytes is not None
            assert private_names(root) == [] and arena_of(engine).num_taken == 0
            assert engine.latest() == "small"
            (disk / "other").unlink()
            job.whole("after", 3)
        check_legal(contents(root), job.told)


def _fill(path: Path, *, keep_bytes: int) -> None:
    """Use the disk up, but for about `keep_bytes`."""
    with open(path, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError as error:
            assert error.errno == errno.ENOSPC
        file.truncate(max(0, file.tell() - keep_bytes))
