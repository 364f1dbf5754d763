"""Clone every tensor, then `torch.save` in a thread: what people write by hand."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from benchmarks.contenders.base import Contender, clone_tree
from benchmarks.workloads import State, Workload


class ThreadClone(Contender):
    """Fresh clones for each save, one background thread, one save in flight."""

    config = "clone every tensor; torch.save in a ThreadPoolExecutor(1); one in flight"

    def setup(self, directory: Path, workload: Workload) -> None:
        super().setup(directory, workload)
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.pending: Future[None] | None = None

    def save(self, step: int, state: State) -> None:
        self.wait_durable()
        self.pending = self.pool.submit(torch.save, clone_tree(state), self.produced(step))

    def wait_durable(self) -> None:
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def close(self) -> None:
        self.pool.shutdown()
