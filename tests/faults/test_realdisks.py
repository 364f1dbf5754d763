"""A sample of `tests.faults.realdisks`."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, Catalog
from async_ckpt.errors import OutOfSpaceError
from async_ckpt.metrics import CommitMetrics

from .realdisks import MKFS, SIZES, mounted, sweep, sweep_broken, why_not

pytestmark = pytest.mark.wide


def _skip_without(kind: str) -> None:
    reason = why_not() or (f"{MKFS[kind][0]} is not installed" if shutil.which(MKFS[kind][0]) is None else None)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("kind", MKFS)
def test_power_cut_at_a_sample_of_moments(kind: str) -> None:
    _skip_without(kind)
    row = sweep(kind, "replace", direct=True, sample=6)
    assert row.operations > 30 and row.survived == row.injected == 6


@pytest.mark.parametrize(
    ("kind", "name"), [("xfs", "shared chunks"), ("btrfs", "shared chunks"), ("ext4", "shared files")]
)
def test_power_cut_while_bytes_are_shared(kind: str, name: str) -> None:
    _skip_without(kind)
    row = sweep(kind, name, direct=kind == "xfs", sample=6)
    assert row.operations > 30 and row.survived == row.injected == 6


MiB = 1 << 20


@contextlib.contextmanager
def _disk(kind: str, folder: Path) -> Iterator[Path]:
    _skip_without(kind)
    image = folder / "disk.img"
    with open(image, "wb") as file:
        file.truncate(SIZES[kind])
    subprocess.run([*MKFS[kind], image], check=True, capture_output=True, timeout=60)
    with mounted(image, kind, folder / "disk") as place:
        yield place


def _commit(engine: AsyncCheckpointEngine, tag: str, state: dict[str, torch.Tensor]) -> CommitMetrics:
    engine.create(tag)
    engine.save(state, "m.pt")
    pending = engine.commit(tag)
    pending.result(60)
    return pending.metrics


def _check(root: Path, tag: str, state: dict[str, torch.Tensor]) -> None:
    assert Catalog(root).verify(tag).ok
    loaded = torch.load(root / tag / "m.pt")
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_shared_chunks_need_no_room_and_outlive_each_other(kind: str, tmp_path: Path) -> None:
    """Ten checkpoints of 24 MiB on a disk that has room for a few: each is whole when all the others are gone."""
    with _disk(kind, tmp_path) as disk:
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
    with _disk(kind, tmp_path) as disk:
        state = {"w": torch.zeros(MiB)}
        with AsyncCheckpointEngine(disk / "root", reuse="auto", chunk_bytes=MiB, staging_bytes=32 * MiB) as engine:
            _commit(engine, "a", state)
            before = os.stat(disk / "root" / "a" / "m.pt")
            with open(disk / "root" / "a" / "m.pt", "r+b") as file:
                file.seek(MiB + 5)
                file.write(b"rot")
                os.fsync(file.fileno())
            os.utime(disk / "root" / "a" / "m.pt", ns=(before.st_atime_ns, before.st_mtime_ns))
            assert _commit(engine, "b", state).shared_bytes > 2 * MiB
        assert [Catalog(disk / "root").verify(tag).ok for tag in "ab"] == [False, False]


def test_a_quota_that_is_used_up_fails_the_save_and_nothing_else(tmp_path: Path) -> None:
    with _disk("btrfs", tmp_path) as disk:
        if shutil.which("btrfs") is None:
            pytest.skip("btrfs-progs is not installed")
        root = disk / "root"
        for command in (f"subvolume create {root}", f"quota enable {disk}", f"qgroup limit 24M {root}"):
            subprocess.run(["btrfs", *command.split()], check=True, capture_output=True, timeout=60)
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
