"""Commits as TensorBoard scalars."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from ..metrics import CommitMetrics, MirrorMetrics, Observer


class ScalarWriter(Protocol):
    """What is needed of a `SummaryWriter`."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


def step_of_tag(tag: str) -> int | None:
    """The last number in a tag ("step-000100" is 100); None without one."""
    numbers = re.findall("[0-9]+", tag)
    return int(numbers[-1]) if numbers else None


class TensorBoardObserver(Observer):
    """Writes one point per commit of stall, times, size and throughput, and one per upload to a mirror. Any thread, one
    call at a time per commit.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its `add_scalar`. The caller closes it.
        step_of: the x axis, from a commit's metrics; None takes the last number in the tag, else counts commits.
        prefix: in front of every scalar's name.
    """

    def __init__(
        self, writer: ScalarWriter, step_of: Callable[[CommitMetrics], int] | None = None, prefix: str = "checkpoint"
    ) -> None:
        self._writer = writer
        self._step_of = step_of
        self._prefix = prefix
        self._num_commits = 0
        self._steps: dict[str, int] = {}

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
        self._num_commits += 1
        step = self._step_of(metrics) if self._step_of is not None else step_of_tag(metrics.tag)
        step = self._steps[metrics.tag] = self._num_commits if step is None else step
        values: dict[str, float] = {"failed": float(error is not None)}
        if error is None:
            values |= {
                "stall_s": metrics.stall_s,
                "durable_s": metrics.total_s,
                "publish_s": metrics.publish_s,
                "size_bytes": metrics.size_bytes,
                "bytes_per_s": metrics.bytes_per_s,
                "backpressure_s": metrics.backpressure_s,
                "copy_s": metrics.copy_s,
                "crc_s": metrics.crc_s,
                "write_s": metrics.write_s,
                "sync_s": metrics.sync_s,
                "direct": float(metrics.direct),
                "max_queue_chunks": metrics.max_queue_chunks,
            }
        for name, value in values.items():
            self._writer.add_scalar(f"{self._prefix}/{name}", value, step)

    def on_mirror(self, metrics: MirrorMetrics, error: BaseException | None) -> None:
        # Of an earlier run, or a command's: only its tag is known.
        step = self._steps.pop(metrics.tag, None) if error is None else self._steps.get(metrics.tag)
        step = step if step is not None else step_of_tag(metrics.tag) or 0
        values: dict[str, float] = {"failed": float(error is not None)}
        if error is None:
            values |= {name: getattr(metrics, name) for name in ("wait_s", "upload_s", "sent_bytes", "bytes_per_s")}
        for name, value in values.items():
            self._writer.add_scalar(f"{self._prefix}/mirror/{metrics.url.partition('://')[2]}/{name}", value, step)
