"""torch_checkpointing: staging in a thread into shared memory, writing in a process.

Its direct I/O is switched off: the default writes unaligned and fails every save on ext4 with EINVAL.
"""

from __future__ import annotations

from torch_checkpointing import CheckpointManager
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from benchmarks.contenders.base import Contender
from benchmarks.workloads import State


class TorchCheckpointing(Contender):
    """Asynchronous manager, prewarmed; `manager.lock()` is its way to wait until tensors may change."""

    config = "CheckpointManager(async save, use_direct_io=False), prewarm_staging, lock() before the optimizer step"

    def start(self) -> None:
        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self.manager = CheckpointManager(CheckpointManager.Config(storage_config=storage))

    def prewarm(self) -> None:
        self.manager.prewarm_staging(self.workload.state())

    def save(self, step: int, state: State) -> None:
        self.wait_durable()
        self.pending = self.manager.save(str(self.produced(step)), state)

    def wait_safe(self) -> None:
        with self.manager.lock():
            return

    def close(self) -> None:
        self.manager.close()
