"""The one thread that publishes an engine's status, at most a few times per second, and only while something changes.

Guarantees:
- Nothing is written on any other thread: `changed` costs a microsecond.
- A place that cannot be written harms nothing: it is reported once, and tried again with the next change.
- The files are removed when it is closed. Nothing is ever synced.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Sequence

from ..threads.executor import DaemonExecutor
from ..threads.locks import Condition
from .status_places import StatusPlace

logger = logging.getLogger("async_ckpt")

_MIN_INTERVAL_S = 0.25
_BUSY_INTERVAL_S = 0.5
_CLOSE_TIMEOUT_S = 2.0

numbers = itertools.count()
"""Tells the engines of one process apart."""


class StatusWriter:
    """Publishes what `document` says to every place. `changed`: any thread, never blocks.

    Args:
        document: the content, and whether something is in flight (then it is asked again soon, without being told);
            called on the writer's thread.
        at_first: called on the writer's thread before anything is published.
    """

    def __init__(
        self, document: Callable[[], tuple[bytes, bool]], places: Sequence[StatusPlace], *, at_first: Callable[[], object] = lambda: None
    ) -> None:
        self._document = document
        self._places = tuple(places)
        self._at_first = at_first
        self._pid = os.getpid()
        self._reported: set[StatusPlace] = set()
        self._changed = Condition()
        self._is_dirty = True
        self._is_closed = False
        self._num_asked = self._num_published = 0
        self._executor = DaemonExecutor("async-ckpt-status", 1)
        self._executor.submit(self._run)

    def changed(self) -> None:
        """Something is to be told."""
        if self._is_dirty or os.getpid() != self._pid:
            return
        with self._changed:
            self._is_dirty = True
            self._changed.notify_all()

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Block until all that was so is published; False when that took longer than `timeout_s` seconds."""
        with self._changed:
            self._num_asked += 1
            asked = self._num_asked
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._num_published >= asked or self._is_closed, timeout_s)

    def close(self) -> None:
        """Remove the files and end the thread; idempotent. Blocks for two seconds at most, on a place that hangs."""
        if os.getpid() != self._pid:
            return
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._executor.shutdown(wait=False)
        if not self._executor.join(_CLOSE_TIMEOUT_S):
            logger.warning("the status of this engine is stuck in the system and was not removed; checkpoints are not affected")

    def _run(self) -> None:
        try:
            self._guarded(self._at_first)
            while not self._is_closed:
                with self._changed:
                    asked, self._is_dirty = self._num_asked, False
                is_busy = self._guarded(self._publish)
                with self._changed:
                    self._num_published = asked
                    self._changed.notify_all()
                    self._changed.wait_for(self._must_hurry, _MIN_INTERVAL_S)
                    self._changed.wait_for(lambda: self._must_hurry() or self._is_dirty, _BUSY_INTERVAL_S if is_busy else None)
        finally:
            for place in self._places:
                self._guarded(place.remove)

    def _must_hurry(self) -> bool:
        return self._is_closed or self._num_asked > self._num_published

    def _publish(self) -> bool:
        data, is_busy = self._document()
        for place in self._places:
            try:
                place.write(data)
            except OSError as error:
                if place not in self._reported:
                    logger.warning("the status of this engine cannot be published (checkpoints are not affected): %s", error)
                    self._reported.add(place)
        return is_busy

    @staticmethod
    def _guarded(call: Callable[[], object]) -> bool:
        """What goes wrong in here is never worth a checkpoint."""
        try:
            return bool(call())
        except Exception:
            logger.warning("publishing the status of this engine failed (checkpoints are not affected)", exc_info=True)
            return False
