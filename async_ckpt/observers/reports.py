"""Commits, saves and uploads as `logging` records, Prometheus metrics and TensorBoard scalars.

The libraries of these tools are needed only by those who use them.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from ..metrics import CommitMetrics, MirrorMetrics, Observer, SaveMetrics
from .units import format_bytes, format_rate, format_seconds

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_STALL_BUCKETS_S = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
_COMMIT_BUCKETS_S = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_WORK = ("copy", "crc", "write", "sync")
_COMMIT_SCALARS = (
    *("stall_s", "publish_s", "size_bytes", "bytes_per_s", "backpressure_s", "direct", "max_queue_chunks"),
    *(f"{kind}_s" for kind in _WORK),
)
_MIRROR_SCALARS = ("wait_s", "upload_s", "sent_bytes", "bytes_per_s")


class LoggingObserver(Observer):
    """One record per commit (at `level`, failures as ERROR) and one per file (DEBUG). Any thread.

    Each record carries the metrics as its attribute ``async_ckpt``, for structured handlers.
    """

    def __init__(self, logger: logging.Logger | str = "async_ckpt", level: int = logging.INFO) -> None:
        self._logger = logging.getLogger(logger) if isinstance(logger, str) else logger
        self._level = level

    def on_save(self, metrics: SaveMetrics) -> None:
        told = (
            "checkpoint %r: %s is durable: %s in %s; %s, %s planner, %s; stall %s, copy %s, CRC %s, write %s, sync %s"
        )
        size, durable = format_bytes(metrics.size_bytes), format_seconds(metrics.durable_s)
        how = metrics.mode, metrics.planner, "direct" if metrics.direct else "buffered"
        seconds = metrics.stall_s, metrics.copy_s, metrics.crc_s, metrics.write_s, metrics.sync_s
        about = metrics.path, size, durable, *how, *map(format_seconds, seconds)
        self._log(logging.DEBUG, metrics, told, *about)

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
        if error is not None:
            self._log(logging.ERROR, metrics, "checkpoint %r was not committed: %s", error)
            return
        told = "checkpoint %r committed: %s in %d files, durable after %s (%s), stall %s, at most %d chunks queued"
        size, rate = format_bytes(metrics.size_bytes), format_rate(metrics.bytes_per_s)
        durable, stall = format_seconds(metrics.total_s), format_seconds(metrics.stall_s)
        self._log(self._level, metrics, told, size, metrics.num_files, durable, rate, stall, metrics.max_queue_chunks)

    def on_abort(self, metrics: CommitMetrics, error: BaseException) -> None:
        self._log(self._level, metrics, "checkpoint %r was given up: %s", error)

    def on_mirror(self, metrics: MirrorMetrics, error: BaseException | None) -> None:
        if error is not None:
            self._log(logging.ERROR, metrics, "checkpoint %r was not mirrored to %s: %s", metrics.url, error)
            return
        size, rate = format_bytes(metrics.sent_bytes), format_rate(metrics.bytes_per_s)
        told = "checkpoint %r mirrored to %s: %s sent in %s (%s)"
        self._log(self._level, metrics, told, metrics.url, size, format_seconds(metrics.upload_s), rate)

    def _log(self, level: int, metrics: SaveMetrics | CommitMetrics | MirrorMetrics, told: str, *about: object) -> None:
        self._logger.log(level, told, metrics.tag, *about, extra={"async_ckpt": metrics})


class PrometheusObserver(Observer):
    """Counts, sizes and times under names that start with `prefix`. Any thread.

    The caller serves or pushes them (``prometheus_client.start_http_server``). What to alert on:
    ``time() - async_ckpt_last_commit_timestamp_seconds`` and ``async_ckpt_commit_failures_total``.

    Args:
        registry: where the metrics are registered; None is the library's default one.

    Raises:
        ImportError: `prometheus_client` is not installed (the `prometheus` extra).
        ValueError: another observer has registered the same names in the same registry.
    """

    def __init__(self, registry: CollectorRegistry | None = None, prefix: str = "async_ckpt") -> None:
        import prometheus_client as library

        options: dict[str, Any] = {} if registry is None else {"registry": registry}

        def make(kind: Any, name: str, text: str, labels: tuple[str, ...] = (), **more: Any) -> Any:
            return kind(f"{prefix}_{name}", text, labels, **more, **options)

        counter, gauge, histogram = library.Counter, library.Gauge, library.Histogram
        stall, total = "Time the training thread was blocked per checkpoint", "From the first save until committed"
        work, mirrored = "Time of the writers' work, summed over threads", "When a checkpoint was last mirrored"
        self._commits = make(counter, "commits", "Checkpoints committed")
        self._failures = make(counter, "commit_failures", "Checkpoints that were not committed")
        self._aborted = make(counter, "aborts", "Checkpoints given up before their commit")
        self._bytes = make(counter, "durable_bytes", "Bytes committed")
        self._stall = make(histogram, "stall_seconds", stall, buckets=_STALL_BUCKETS_S)
        self._total = make(histogram, "durable_seconds", total, buckets=_COMMIT_BUCKETS_S)
        self._backpressure = make(counter, "backpressure_seconds", "Waits for staging memory")
        self._work = make(counter, "work_seconds", work, ("kind",))
        self._files = make(counter, "files", "Files written", ("io",))
        self._last = make(gauge, "last_commit_timestamp_seconds", "When the newest checkpoint was committed")
        self._rate = make(gauge, "last_commit_bytes_per_second", "Durable throughput of the newest checkpoint")
        self._queue = make(gauge, "max_queue_chunks", "Most chunks that waited for the disk at once")
        self._undeleted = make(gauge, "undeleted_checkpoints", "Old checkpoints that cannot be deleted now")
        self._in_a_row = make(
            gauge, "failed_commits_in_a_row", "Newest commits that failed and were tolerated, or one too many"
        )
        self._mirrored = make(counter, "mirrored", "Checkpoints mirrored", ("mirror",))
        self._unmirrored = make(counter, "mirror_failures", "Uploads that failed", ("mirror",))
        self._sent = make(counter, "mirrored_bytes", "Bytes sent to mirrors", ("mirror",))
        self._last_mirrored = make(gauge, "last_mirrored_timestamp_seconds", mirrored, ("mirror",))

    def on_save(self, metrics: SaveMetrics) -> None:
        self._files.labels("direct" if metrics.direct else "buffered").inc()
        self._backpressure.inc(metrics.backpressure_s)
        for kind in _WORK:
            self._work.labels(kind).inc(getattr(metrics, f"{kind}_s"))

    def on_abort(self, metrics: CommitMetrics, error: BaseException) -> None:
        self._aborted.inc()

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
        self._in_a_row.set(metrics.num_failed_in_a_row)
        if error is not None:
            self._failures.inc()
            return
        self._commits.inc()
        self._bytes.inc(metrics.size_bytes)
        self._stall.observe(metrics.stall_s)
        self._total.observe(metrics.total_s)
        self._last.set(time.time())
        self._rate.set(metrics.bytes_per_s)
        self._queue.set(metrics.max_queue_chunks)
        self._undeleted.set(metrics.num_undeleted)

    def on_mirror(self, metrics: MirrorMetrics, error: BaseException | None) -> None:
        self._sent.labels(metrics.url).inc(metrics.sent_bytes)
        if error is not None:
            self._unmirrored.labels(metrics.url).inc()
            return
        self._mirrored.labels(metrics.url).inc()
        self._last_mirrored.labels(metrics.url).set(time.time())


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
        scalars = {name: getattr(metrics, name) for name in _COMMIT_SCALARS}
        self._add("", {"durable_s": metrics.total_s, **scalars}, error, step)

    def on_mirror(self, metrics: MirrorMetrics, error: BaseException | None) -> None:
        # Of an earlier run, or a command's: only its tag is known.
        step = self._steps.pop(metrics.tag, None) if error is None else self._steps.get(metrics.tag)
        step = step if step is not None else step_of_tag(metrics.tag) or 0
        scalars = {name: getattr(metrics, name) for name in _MIRROR_SCALARS}
        self._add(f"/mirror/{metrics.url.partition('://')[2]}", scalars, error, step)

    def _add(self, where: str, scalars: dict[str, float], error: BaseException | None, step: int) -> None:
        values = {"failed": error is not None, **(scalars if error is None else {})}
        for name, value in values.items():
            self._writer.add_scalar(f"{self._prefix}{where}/{name}", float(value), step)
