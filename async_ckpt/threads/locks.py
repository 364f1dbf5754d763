"""Locks that an exception out of a signal handler cannot leave locked.

KeyboardInterrupt strikes wherever the interpreter looks for signals. From Python 3.14 on it looks between the acquisition
by ``with threading.Lock()`` and the body, and on every version inside ``with threading.Condition()``: the lock is then
held for ever, and the next `close()` hangs. (The same holds inside the standard library's queues, events and futures,
which no caller can mend.) So the package enters no lock of `threading`; tests/test_rooms.py holds that.
"""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable


class Lock(_thread.RLock):  # type: ignore[misc]  # final for type checkers, not for the interpreter
    """A re-entrant lock, for ``with``: held in the body, and by nobody after it, whatever a signal handler raises and when.

    Any thread. `__exit__` must stay the C method of the base: a Python one could be interrupted before it releases.
    """

    def __enter__(self) -> bool:  # type: ignore[override]  # typeshed writes it with the arguments of `acquire`
        """Blocks until this thread has the lock."""
        try:
            self.acquire()
        except BaseException:
            # It may have been acquired. No question may be asked first: to ask is a call, and may be interrupted again.
            try:  # noqa: SIM105 -- `suppress` is two more calls
                self.release()
            except RuntimeError:
                # Interrupted while it waited: not acquired. (Who has it already never waits.)
                pass
            raise
        return True


class Condition(Lock):  # type: ignore[misc]  # as above
    """A lock whose holder can wait for another's word; `wait` gives it up meanwhile. Any thread."""

    def __init__(self) -> None:
        self._waiters = threading.Condition(self)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until notified, or for `timeout_s`; False when the time was over. Only with the lock held."""
        return self._waiters.wait(timeout_s)

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Block until `predicate()`, or for `timeout_s`; what it gave last. Only with the lock held."""
        return self._waiters.wait_for(predicate, timeout_s)

    def notify_all(self) -> None:
        """Wake everybody who waits. Only with the lock held; never blocks."""
        self._waiters.notify_all()


_MAX_INTERRUPTS = 1000


def uninterrupted(wait: Callable[[], object]) -> None:
    """Call `wait` until it returns, again after each exception out of a signal handler; the last of them is raised then.

    For what must have ended before memory or descriptors are given up. `wait` may begin anew; what it raises every time is raised.
    """
    interrupted: BaseException | None = None
    for _ in range(_MAX_INTERRUPTS):
        try:
            wait()
            break
        except BaseException as error:  # noqa: BLE001 -- raised below
            interrupted = error
    if interrupted is not None:
        raise interrupted
