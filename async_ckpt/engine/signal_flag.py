"""A flag that a signal sets, and nothing more: what a handler may do between any two bytecodes.

Guarantees:
- The handler takes no lock and does no I/O; it passes the signal on to the handler that was there before.
- `SignalFlag` refers to nothing else, so that the signal table keeps no engine alive.
- A forked child gets the earlier handlers back: a signal to a DataLoader worker ends that worker.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from types import FrameType
from typing import Any


class SignalFlag:
    """Set by the first of some signals. `at_s` is on ``time.monotonic``.

    A second signal: SIGINT raises KeyboardInterrupt; others are counted, and after `deadline_s` they do what they did
    before (schedulers and launchers often send two at once).
    """

    def __init__(self, deadline_s: float) -> None:
        self.pid = os.getpid()
        self.deadline_s = deadline_s
        self.signum: int | None = None
        self.num_signals = 0
        self.at_s = 0.0
        self.earlier: dict[int, Any] = {}
        self.active = True

    def watch(self, signals: list[int]) -> None:
        """Set the handlers. Main thread only."""
        _flags.add(self)
        for signum in signals:
            # Known before ours is in place: a signal may arrive in between.
            self.earlier[signum] = signal.getsignal(signum)
            signal.signal(signum, self.handle)

    def remove(self) -> None:
        """Give the signals back to their earlier handlers. Off the main thread ours stay in place, and only pass on."""
        if threading.current_thread() is threading.main_thread() and os.getpid() == self.pid:
            self.restore()
        self.active = False

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """The signal handler."""
        earlier = self.earlier.get(signum)
        if os.getpid() != self.pid or not self.active:
            self._pass_on(signum, frame, earlier)
            return
        now = time.monotonic()
        if self.signum is None:
            self.at_s = now
            self.signum = signum
        self.num_signals += 1
        is_first = self.num_signals == 1
        if earlier is signal.default_int_handler and is_first:
            return
        if callable(earlier):
            earlier(signum, frame)
        elif earlier == signal.SIG_DFL and not is_first and now > self.at_s + self.deadline_s:
            self._pass_on(signum, frame, earlier)

    @staticmethod
    def _pass_on(signum: int, frame: FrameType | None, earlier: Any) -> None:
        if callable(earlier):
            earlier(signum, frame)
        elif earlier == signal.SIG_DFL:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    def restore(self) -> None:
        """Put the earlier handlers back where ours are still in place; elsewhere somebody chained to us, and we only
        pass on."""
        self.active = False
        for signum, earlier in self.earlier.items():
            if signal.getsignal(signum) == self.handle and earlier is not None:
                signal.signal(signum, earlier)


_flags: weakref.WeakSet[SignalFlag] = weakref.WeakSet()


def _restore_in_child() -> None:
    for flag in list(_flags):
        flag.restore()


os.register_at_fork(after_in_child=_restore_in_child)
