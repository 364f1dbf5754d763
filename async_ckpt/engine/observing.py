"""Runs the user's code: observers and done-callbacks, on one thread that nothing else waits for.

Guarantees:
- Whatever it does (raise anything, block, call the engine), it harms no checkpoint: no lock of ours is held around it.
- One after the other, in the order of the events. A broken observer is left out after one warning.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable

from ..errors import TransactionStateError, report
from ..metrics import Observer, Span
from ..threads.executor import DaemonExecutor
from ..threads.outcome import run_guarded

# Of spans: an observer that is this far behind hears of checkpoints, and no more of chunks.
_MAX_BEHIND = 10_000


class Callbacks:
    """Several observers as one, and their thread. Any thread; only `close` blocks; nothing raises.

    Raises:
        RuntimeError: the thread could not be started.
    """

    def __init__(self, observers: Iterable[Observer], name: str) -> None:
        self._observers = list(observers)
        self._thread = DaemonExecutor(name, 1)

    def run(self, call: Callable[[], object]) -> None:
        """Run `call` on the thread, after everything before it; here and now once the thread has ended."""
        try:
            self._thread.submit(run_guarded, call)
        except TransactionStateError:
            run_guarded(call)

    def report(self, level: int, message: str, *args: object) -> None:
        """Log on the thread: log handlers are the user's code too."""
        self.run(lambda: report(level, message, *args))

    def on_span(self, span: Span) -> None:
        if self._thread.num_queued < _MAX_BEHIND:
            self.tell("on_span", span)

    def tell_span(
        self, kind: str, start_s: float, tag: str, path: str = "", offset: int = 0, num_bytes: int = 0
    ) -> None:
        """Tell about a piece of work that ended now, on this thread."""
        thread = threading.current_thread().name
        self.on_span(Span(kind, start_s, time.perf_counter(), thread, tag, path, offset, num_bytes))

    def tell(self, event: str, *about: object) -> None:
        """Call this method of each observer; one that does not derive from `Observer` may not have all of them."""
        if self._observers:
            self.run(lambda: self._tell_now(event, *about))

    def close(self, timeout_s: float) -> None:
        """Let what is queued run, for `timeout_s` seconds at most; it goes on after that, and so does everybody
        else.
        """
        self._thread.shutdown(wait=False)
        if not self._thread.join(timeout_s):
            report(
                logging.WARNING,
                "a callback or observer did not end within %.1f s and goes on; no checkpoint waits for it",
                timeout_s,
            )

    def _tell_now(self, event: str, *about: object) -> None:
        for observer in tuple(self._observers):
            try:
                getattr(observer, event, lambda *_: None)(*about)
            except BaseException as error:  # noqa: BLE001 - foreign code: whatever it raises must not fail a checkpoint
                self._observers.remove(observer)
                told = "observer %r raised %r and is left out from now on"
                report(logging.WARNING, told, observer, error, warning=RuntimeWarning)
