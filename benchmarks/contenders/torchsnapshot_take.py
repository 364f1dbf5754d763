"""torchsnapshot `Snapshot.async_take`: asyncio and aiofiles, its own format."""

from __future__ import annotations

from torchsnapshot import Snapshot, StateDict

from benchmarks.contenders.base import Contender, single_rank_environment
from benchmarks.workloads import State


class TorchsnapshotAsyncTake(Contender):
    """Returns when everything is staged in host memory; batching of small tensors is its default."""

    config = "Snapshot.async_take(path, {'state': StateDict}), batching on"

    def start(self) -> None:
        single_rank_environment()

    def save(self, step: int, state: State) -> None:
        self.wait_durable()
        self.pending = Snapshot.async_take(str(self.produced(step)), {"state": StateDict(**state)})

    def wait_durable(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None
