"""The same job on real ext4, xfs, btrfs and tmpfs: direct I/O where the file system has it, buffered where not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, Catalog
from tests.support.mounts import mounted
from tests.support.stepping import saved

from ..support.comparing import torch_bytes


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
@pytest.mark.parametrize("io_mode", ["direct", "buffered"])
def test_committed_bytes_are_right(tmp_path: Path, kind: str, io_mode: str) -> None:
    # xfs refuses to be smaller than 300 MB.
    with mounted(kind, tmp_path, (320 if kind == "xfs" else 160) << 20) as root:
        state = {"a": torch.randn(3_000_001), "b": torch.arange(11), "n": 5}
        with AsyncCheckpointEngine(root / "run", staging_bytes=8 << 20, io_mode=io_mode, overwrite="replace") as engine:
            for _ in range(2):
                pending = saved(engine, state)
                pending.result(60)
            direct = pending.metrics.saves[0].direct
            assert torch.equal(engine.load("t/s.pt")["a"], state["a"])
        assert (root / "run" / "t" / "s.pt").read_bytes() == torch_bytes(state)
        assert Catalog(root / "run").latest() == "t"
        assert direct == (io_mode == "direct" and kind in ("ext4", "xfs", "btrfs"))
