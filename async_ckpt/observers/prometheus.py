"""Commits and saves as Prometheus metrics, through the `prometheus_client` library."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from ..metrics import CommitMetrics, MirrorMetrics, Observer, SaveMetrics

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

_STALL_BUCKETS_S = (0.0001, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0)
_COMMIT_BUCKETS_S = (0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


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
        for kind in ("copy", "crc", "write", "sync"):
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
