"""Commits and saves as `logging` records."""

from __future__ import annotations

import logging

from ..metrics import CommitMetrics, MirrorMetrics, Observer, SaveMetrics
from .units import format_bytes, format_rate, format_seconds


class LoggingObserver(Observer):
    """One record per commit (at `level`, failures as ERROR) and one per file (DEBUG). Any thread.

    Each record carries the metrics as its attribute ``async_ckpt``, for structured handlers.
    """

    def __init__(self, logger: logging.Logger | str = "async_ckpt", level: int = logging.INFO) -> None:
        self._logger = logging.getLogger(logger) if isinstance(logger, str) else logger
        self._level = level

    def on_save(self, metrics: SaveMetrics) -> None:
        self._logger.debug(
            "checkpoint %r: %s is durable: %s in %s; %s, %s planner, %s; stall %s, copy %s, CRC %s, write %s, sync %s",
            metrics.tag,
            metrics.path,
            format_bytes(metrics.size_bytes),
            format_seconds(metrics.durable_s),
            metrics.mode,
            metrics.planner,
            "direct" if metrics.direct else "buffered",
            *map(format_seconds, (metrics.stall_s, metrics.copy_s, metrics.crc_s, metrics.write_s, metrics.sync_s)),
            extra={"async_ckpt": metrics},
        )

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
        if error is not None:
            self._logger.error("checkpoint %r was not committed: %s", metrics.tag, error, extra={"async_ckpt": metrics})
            return
        self._logger.log(
            self._level,
            "checkpoint %r committed: %s in %d files, durable after %s (%s), stall %s, at most %d chunks queued",
            metrics.tag,
            format_bytes(metrics.size_bytes),
            metrics.num_files,
            format_seconds(metrics.total_s),
            format_rate(metrics.bytes_per_s),
            format_seconds(metrics.stall_s),
            metrics.max_queue_chunks,
            extra={"async_ckpt": metrics},
        )

    def on_abort(self, metrics: CommitMetrics, error: BaseException) -> None:
        self._logger.log(
            self._level, "checkpoint %r was given up: %s", metrics.tag, error, extra={"async_ckpt": metrics}
        )

    def on_mirror(self, metrics: MirrorMetrics, error: BaseException | None) -> None:
        if error is not None:
            told = "checkpoint %r was not mirrored to %s: %s"
            self._logger.error(told, metrics.tag, metrics.url, error, extra={"async_ckpt": metrics})
            return
        self._logger.log(
            self._level,
            "checkpoint %r mirrored to %s: %s sent in %s (%s)",
            metrics.tag,
            metrics.url,
            format_bytes(metrics.sent_bytes),
            format_seconds(metrics.upload_s),
            format_rate(metrics.bytes_per_s),
            extra={"async_ckpt": metrics},
        )
