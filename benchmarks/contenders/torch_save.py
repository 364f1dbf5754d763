"""`torch.save` to a path: the baseline everyone has, without and with syncing."""

from __future__ import annotations

import torch

from benchmarks.contenders.base import Contender, Syncs, fsync_path
from benchmarks.workloads import State


class TorchSave(Contender):
    """As written in most training scripts."""

    config = "torch.save(state, path)"

    def save(self, step: int, state: State) -> None:
        torch.save(state, self.produced(step))


class TorchSaveFsync(TorchSave):
    """The file is synced, its directory entry is not."""

    config = "torch.save(state, path); os.fsync(file)"
    syncs: Syncs = "files"

    def save(self, step: int, state: State) -> None:
        super().save(step, state)
        fsync_path(self.produced(step))


class TorchSaveFsyncDir(TorchSaveFsync):
    """The whole of what a synchronous save needs to survive a power cut (still not atomic)."""

    config = "torch.save(state, path); os.fsync(file); os.fsync(directory)"
    syncs: Syncs = "all"

    def save(self, step: int, state: State) -> None:
        super().save(step, state)
        fsync_path(self.directory)
