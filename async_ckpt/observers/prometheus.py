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

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return library.Histogram(f"{prefix}_{name}", text, buckets=buckets, **options)

        self._commits = library.Counter(f"{prefix}_commits", "Checkpoints committed", **options)
        self._failures = library.Counter(f"{prefix}_commit_failures", "Checkpoints that were not committed", **options)
        self._aborted = library.Counter(f"{prefix}_aborts", "Checkpoints given up before their commit", **options)
        self._bytes = library.Counter(f"{prefix}_durable_bytes", "Bytes committed", **options)
        self._stall = histogram(
            "stall_seconds", "Time the training thread was blocked per checkpoint", _STALL_BUCKETS_S
        )
        self._total = histogram("durable_seconds", "From the first save until committed", _COMMIT_BUCKETS_S)
        self._backpressure = library.Counter(f"{prefix}_backpressure_seconds", "Waits for staging memory", **options)
        self._work = library.Counter(
            f"{prefix}_work_seconds", "Time of the writers' work, summed over threads", ["kind"], **options
        )
        self._files = library.Counter(f"{prefix}_files", "Files written", ["io"], **options)
        self._last = library.Gauge(
            f"{prefix}_last_commit_timestamp_seconds", "When the newest checkpoint was committed", **options
        )
        self._rate = library.Gauge(
            f"{prefix}_last_commit_bytes_per_second", "Durable throughput of the newest checkpoint", **options
        )
        self._queue = library.Gauge(
            f"{prefix}_max_queue_chunks", "Most chunks that waited for the disk at once", **options
        )
        self._undeleted = library.Gauge(
            f"{prefix}_undeleted_checkpoints", "Old checkpoints that cannot be deleted now", **options
        )
        self._mirrored = library.Counter(f"{prefix}_mirrored", "Checkpoints mirrored", ["mirror"], **options)
        self._unmirrored = library.Counter(f"{prefix}_mirror_failures", "Uploads that failed", ["mirror"], **options)
        self._sent = library.Counter(f"{prefix}_mirrored_bytes", "Bytes sent to mirrors", ["mirror"], **options)
        self._last_mirrored = library.Gauge(
            f"{prefix}_last_mirrored_timestamp_seconds", "When a checkpoint was last mirrored", ["mirror"], **options
        )

    def on_save(self, metrics: SaveMetrics) -> None:
        self._files.labels("direct" if metrics.direct else "buffered").inc()
        self._backpressure.inc(metrics.backpressure_s)
        for kind in ("copy", "crc", "write", "sync"):
            self._work.labels(kind).inc(getattr(metrics, f"{kind}_s"))

    def on_abort(self, metrics: CommitMetrics, error: BaseException) -> None:
        self._aborted.inc()

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
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
