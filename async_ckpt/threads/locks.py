"""Locks that an exception out of a signal handler cannot leave locked.

KeyboardInterrupt strikes wherever the interpreter looks for signals. From Python 3.14 on it looks between the
acquisition by ``with threading.Lock()`` and the body, and on every version inside ``with threading.Condition()``: the
lock is then held for ever, and the next `close()` hangs. (The same holds inside the standard library's queues, events
and futures, which no caller can mend.) So the package enters no lock of `threading`; tests/test_rooms.py holds that.

And no lock is held for ever in a forked child because a thread of the parent held it in that moment. What the lock
protects may be half changed there: whatever belongs to the parent refuses to be used in a child, by its process id.
"""

from __future__ import annotations

import _thread
import os
import threading
import weakref
from collections.abc import Callable


class Lock(_thread.RLock):  # type: ignore[misc]  # final for type checkers, not for the interpreter
    """A re-entrant lock, for ``with``: held in the body, and by nobody after it, whatever a signal handler raises and
    when. Its holder can wait for another's word (`wait`), and gives it up meanwhile.

    Any thread, and any process. `__exit__` must stay the C method of the base: a Python one could be interrupted before
    it releases.
    """

    _waiters: threading.Condition | None = None

    def __init__(self) -> None:
        _locks.add(self)

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

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until notified, or for `timeout_s`; False when the time was over. Only with the lock held."""
        # In one operation: a signal handler may wait here too.
        waiters: threading.Condition = self.__dict__.setdefault("_waiters", threading.Condition(self))
        return waiters.wait(timeout_s)

    def notify_all(self) -> None:
        """Wake everybody who waits. Only with the lock held; never blocks."""
        if self._waiters is not None:
            self._waiters.notify_all()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _free_in_child() -> None:
    for lock in list(_locks):
        # The thread that forked goes on in the child, and leaves what it has entered.
        if not lock._is_owned():  # type: ignore[attr-defined]  # as `threading.Condition` asks it
            lock._at_fork_reinit()  # type: ignore[attr-defined]  # as the standard library does with its own


os.register_at_fork(after_in_child=_free_in_child)

TRIES = range(1000)
"""How often what must happen is tried again after an interrupt."""


def uninterrupted(wait: Callable[[], object]) -> None:
    """Call `wait` until it returns, again after each exception out of a signal handler; the last of them is raised
    then.

    For what must have ended before memory or descriptors are given up. `wait` may begin anew; what it raises every time
    is raised. An interrupt at the call of this very function is not seen: where that would do harm, the caller has the
    loop."""
    interrupted: BaseException | None = None
    for _ in TRIES:
        try:
            wait()
            break
        except BaseException as error:  # noqa: BLE001 -- raised below
            interrupted = error
    if interrupted is not None:
        raise interrupted
