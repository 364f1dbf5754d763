"""`torch.save`: to a path, the baseline that everyone has, without and with syncing; in a thread, from clones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.contenders.base import Contender, Syncs, clone_tree, fsync_path
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


class ThreadClone(Contender):
    """What people write by hand: fresh clones for each save, one background thread, one save in flight."""

    config = "clone every tensor; torch.save in a ThreadPoolExecutor(1); one in flight"

    def start(self) -> None:
        self.pool = ThreadPoolExecutor(max_workers=1)

    def save(self, step: int, state: State) -> None:
        self.wait_durable()
        self.pending = self.pool.submit(torch.save, clone_tree(state), self.produced(step))

    def close(self) -> None:
        self.pool.shutdown()
