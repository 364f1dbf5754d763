"""This package: `create` + `save` + `commit`, eager, and guarded (lazy)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from async_ckpt import AsyncCheckpointEngine
from benchmarks.contenders.base import Contender
from benchmarks.environment import memory_bytes
from benchmarks.workloads import MIB, State, Workload

STAGING_SLACK_BYTES = 64 * MIB
STREAMED_STAGING_BYTES = 1024 * MIB


def staging_bytes_for(workload: Workload) -> int:
    """Room for one whole snapshot; for a state above a third of the memory far less, so that it is streamed."""
    if workload.num_bytes > memory_bytes() // 3:
        return STREAMED_STAGING_BYTES
    return (workload.num_bytes + STAGING_SLACK_BYTES + MIB - 1) // MIB * MIB


class AsyncCkptEager(Contender):
    """The snapshot is complete when `save` returns."""

    config = (
        "AsyncCheckpointEngine, staging = state + 64 MiB (1 GiB where the state is above a third of the "
        "memory), prewarm, eager"
    )
    syncs = "all"

    def setup(self, directory: Path, workload: Workload) -> None:
        super().setup(directory, workload)
        self.pending: Any = None
        self.engine = AsyncCheckpointEngine(directory, staging_bytes=staging_bytes_for(workload))

    def prewarm(self) -> None:
        self.engine.prewarm(states={"state.pt": self.workload.state()})

    def save(self, step: int, state: State) -> None:
        tag = f"step-{step}"
        self.engine.create(tag)
        self.engine.save(state, "state.pt")
        self.pending = self.engine.commit(tag)

    def wait_durable(self) -> None:
        if self.pending is not None:
            self.pending.result()

    def detail(self) -> dict[str, Any]:
        return {} if self.pending is None else dataclasses.asdict(self.pending.metrics)

    def close(self) -> None:
        self.engine.close()


class AsyncCkptGuarded(AsyncCkptEager):
    """Copies overlap training; the optimizer's step hook waits for them."""

    config = "AsyncCheckpointEngine, staging as eager, guard(optimizer): lazy"

    def setup(self, directory: Path, workload: Workload) -> None:
        super().setup(directory, workload)
        self.engine.guard(workload.optimizer)

    def wait_safe(self) -> None:
        # A step without gradients runs the hook and changes nothing.
        self.workload.optimizer.zero_grad(set_to_none=True)
        self.workload.optimizer.step()

    def before_step(self) -> None:
        return
