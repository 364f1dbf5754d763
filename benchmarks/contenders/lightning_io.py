"""Lightning's AsyncCheckpointIO over TorchCheckpointIO: clones on the caller's thread, torch.save in one thread."""

from __future__ import annotations

from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

from benchmarks.contenders.base import Contender
from benchmarks.workloads import State


class LightningAsyncCheckpointIO(Contender):
    """`teardown` is its only public way to wait; the thread is made again by the next save."""

    config = "AsyncCheckpointIO(TorchCheckpointIO()), teardown() to wait"

    def start(self) -> None:
        self.plugin = AsyncCheckpointIO(TorchCheckpointIO())

    def save(self, step: int, state: State) -> None:
        self.plugin.save_checkpoint(state, self.produced(step))

    def wait_durable(self) -> None:
        self.plugin.teardown()
