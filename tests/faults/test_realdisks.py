"""A sample of `tests.faults.realdisks`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, Catalog
from async_ckpt.errors import OutOfSpaceError
from async_ckpt.metrics import CommitMetrics
from tests.support.mounts import KINDS, can_make, mounted, run
from tests.support.stepping import saved

from .realdisks import SIZES, MiB, sweep, sweep_broken, why_not
from .report import Extent

pytestmark = pytest.mark.wide


def _skip_without(kind: str) -> None:
    reason = why_not() or (None if can_make(kind) else f"{kind} cannot be made here")
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("kind", "name", "direct"),
    [
        *((kind, "replace", True) for kind in KINDS),
        ("xfs", "shared chunks", True),
        ("btrfs", "shared chunks", False),
        ("ext4", "shared files", False),
    ],
)
def test_power_cut_at_a_sample_of_moments(kind: str, name: str, direct: bool) -> None:
    _skip_without(kind)
    row = sweep(kind, name, Extent(6), direct=direct)
    assert row.operations > 30 and row.survived == row.injected == 6


def _commit(engine: AsyncCheckpointEngine, tag: str, state: dict[str, torch.Tensor]) -> CommitMetrics:
    pending = saved(engine, state, tag)
    pending.result(60)
    return pending.metrics


def _check(root: Path, tag: str, state: dict[str, torch.Tensor]) -> None:
    assert Catalog(root).verify(tag).ok
    loaded = torch.load(root / tag / "s.pt")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_shared_chunks_need_no_room_and_outlive_each_other(kind: str, tmp_path: Path) -> None:
    """Ten checkpoints of 24 MiB on a disk that has room for a few: each is whole when all the others are gone."""
    with mounted(kind, tmp_path, SIZES[kind]) as disk:
        state = {f"w{k}": torch.randn(MiB // 4) for k in range(24)}
        how: Any = {"reuse": "auto", "chunk_bytes": MiB, "staging_bytes": 32 * MiB, "io_mode": "direct"}
        with AsyncCheckpointEngine(disk / "root", **how) as engine:
            for k in range(10):
                state["w5"].add_(1)
                metrics = _commit(engine, str(k), state)
                assert k == 0 or metrics.written_bytes <= 4 * MiB
            _check(disk / "root", "9", state)
            used = shutil.disk_usage(disk).used
            for k in range(9):
                engine.delete(str(k))
        _check(disk / "root", "9", state)
        assert used < 160 * MiB


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_bytes_that_have_rotted_are_found_in_both(kind: str, tmp_path: Path) -> None:
    with mounted(kind, tmp_path, SIZES[kind]) as disk:
        state = {"w": torch.zeros(MiB)}
        with AsyncCheckpointEngine(disk / "root", reuse="auto", chunk_bytes=MiB, staging_bytes=32 * MiB) as engine:
            _commit(engine, "a", state)
            before = os.stat(disk / "root" / "a" / "s.pt")
            with open(disk / "root" / "a" / "s.pt", "r+b") as file:
                file.seek(MiB + 5)
                file.write(b"rot")
                os.fsync(file.fileno())
            os.utime(disk / "root" / "a" / "s.pt", ns=(before.st_atime_ns, before.st_mtime_ns))
            assert _commit(engine, "b", state).shared_bytes > 2 * MiB
        assert [Catalog(disk / "root").verify(tag).ok for tag in "ab"] == [False, False]


def test_a_quota_that_is_used_up_fails_the_save_and_nothing_else(tmp_path: Path) -> None:
    with mounted("btrfs", tmp_path, SIZES["btrfs"]) as disk:
        if shutil.which("btrfs") is None:
            pytest.skip("btrfs-progs is not installed")
        root = disk / "root"
        for command in (f"subvolume create {root}", f"quota enable {disk}", f"qgroup limit 24M {root}"):
            run("btrfs", *command.split())
        state = {f"w{k}": torch.randn(MiB // 4) for k in range(12)}
        how: Any = {"reuse": "auto", "chunk_bytes": MiB, "staging_bytes": 32 * MiB}
        with AsyncCheckpointEngine(root, **how) as engine:
            _commit(engine, "a", state)
            # Two whole ones are too many; what is shared counts once.
            for tag in "bcd":
                assert _commit(engine, tag, state).shared_bytes > 11 * MiB
            for tensor in state.values():
                tensor.add_(1)
            with pytest.raises(OutOfSpaceError):
                _commit(engine, "e", state)
            assert engine.latest() == "d"
        for tensor in state.values():
            tensor.sub_(1)
        for tag in "abcd":
            assert Catalog(root).verify(tag).ok


def test_a_missing_sync_is_caught_by_a_real_file_system() -> None:
    _skip_without("xfs")
    assert sweep_broken("xfs", "no fsync of the files").lost == 0
