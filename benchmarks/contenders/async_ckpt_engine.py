"""This package: `create` + `save` + `commit`, eager, and guarded (lazy)."""

from __future__ import annotations

import dataclasses
from typing import Any

from async_ckpt import AsyncCheckpointEngine
from benchmarks.contenders.base import Contender
from benchmarks.environment import memory_bytes
from benchmarks.workloads import MIB, State, Workload, commit

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

    def start(self) -> None:
        self.last: Any = None
        self.engine = AsyncCheckpointEngine(self.directory, staging_bytes=staging_bytes_for(self.workload))

    def prewarm(self) -> None:
        self.engine.prewarm(states={"state.pt": self.workload.state()})

    def save(self, step: int, state: State) -> None:
        self.last = self.pending = commit(self.engine, f"step-{step}", state, "state.pt")

    def detail(self) -> dict[str, Any]:
        return {} if self.last is None else dataclasses.asdict(self.last.metrics)

    def close(self) -> None:
        self.engine.close()


class AsyncCkptGuarded(AsyncCkptEager):
    """Copies overlap training; the optimizer's step hook waits for them."""

    config = "AsyncCheckpointEngine, staging as eager, guard(optimizer): lazy"

    def start(self) -> None:
        super().start()
        self.engine.guard(self.workload.optimizer)

    def wait_safe(self) -> None:
        # A step without gradients runs the hook and changes nothing.
        self.workload.optimizer.zero_grad(set_to_none=True)
        self.workload.optimizer.step()

    def before_step(self) -> None:
        return
