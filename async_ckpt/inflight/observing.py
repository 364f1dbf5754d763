"""Hands spans and metrics to observers; a broken observer is left out after one warning and never harms a checkpoint."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable

from ..metrics import CommitMetrics, Observer, SaveMetrics, Span
from ..threads.locks import Lock

logger = logging.getLogger(__name__)


class Observers:
    """Several observers as one. Any thread."""

    def __init__(self, observers: Iterable[Observer]) -> None:
        self._observers = list(observers)
        self._lock = Lock()

    def on_span(self, span: Span) -> None:
        self._tell(lambda observer: observer.on_span(span))

    def on_save(self, metrics: SaveMetrics) -> None:
        self._tell(lambda observer: observer.on_save(metrics))

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
        self._tell(lambda observer: observer.on_commit(metrics, error))

    def on_abort(self, metrics: CommitMetrics, error: BaseException) -> None:
        # Newer than the other events: an observer that does not derive from `Observer` may not have it.
        self._tell(lambda observer: getattr(observer, "on_abort", _ignore)(metrics, error))

    def _tell(self, call: Callable[[Observer], None]) -> None:
        for observer in tuple(self._observers):
            try:
                call(observer)
            except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises must not fail a checkpoint
                with self._lock:
                    if observer in self._observers:
                        self._observers.remove(observer)
                told = f"observer {observer!r} raised {error!r} and is left out from now on"
                try:
                    warnings.warn(told, RuntimeWarning, stacklevel=2)
                except RuntimeWarning:
                    # Warnings are errors here, and this one must not fail a checkpoint either.
                    logger.warning(told)


def _ignore(*_: object) -> None:
    return None
