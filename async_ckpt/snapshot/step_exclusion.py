"""Optimizer steps on one thread and saves on another exclude each other.

Guarantees:
- While a thread steps, no other thread begins to save, and the other way round. Work of the same kind goes on side by
  side.
- A thread never waits for itself: what it begins inside its own turn (a save in a closure, an inner optimizer's step)
  is part of that.
- First come, first served, so that neither kind starves the other. No wait is longer than the time limit.
- A turn ends when `is_over` is set, by an assignment in a ``finally``: no exception out of a signal handler comes in
  between. Should one keep the others from being told, they notice by themselves a moment later.
"""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from ..errors import BackpressureTimeout
from ..threads.locks import Lock

T = TypeVar("T")

# How soon a waiter looks by itself.
_LOOK_AGAIN_S = 0.05


class Work(enum.Enum):
    STEP = "an optimizer step"
    SAVE = "a save"


class Turn:
    """One step or save, of this thread."""

    def __init__(self, exclusion: StepExclusion, work: Work) -> None:
        self._exclusion = exclusion
        self.work = work
        self.thread = threading.get_ident()
        self.is_over = False

    def run(self, call: Callable[[], T]) -> T:
        """`call()` when it is this one's turn; see `StepExclusion.begin`."""
        try:
            self._exclusion.begin(self)
            return call()
        finally:
            self.is_over = True
            self._exclusion.tell()

    def end(self) -> None:
        """End it early: what remains to be done touches nothing that the other kind of work does."""
        self.is_over = True
        self._exclusion.tell()


class StepExclusion:
    """Who steps and who saves. Any thread; re-entrant, also from signal handlers and finalizers."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._changed = Lock()
        self._running: list[Turn] = []
        self._queue: list[Turn] = []

    def begin(self, turn: Turn) -> None:
        """Begin `turn`, of this thread; blocks while other threads do the other kind of work. Raises
        BackpressureTimeout: that did not end in time; this one has not begun."""
        with self._changed:
            outer = self._outermost(turn.thread)
            if outer is not None:
                turn.work = outer.work
            elif self._queue or self._in_the_way(turn):
                self._wait(turn)
            self._running.append(turn)

    def tell(self) -> None:
        """Wake everybody who waits for a turn that is over. Does not block."""
        with self._changed:
            self._forget_ended()
            self._changed.notify_all()

    def in_own_step(self) -> bool:
        with self._changed:
            outer = self._outermost(threading.get_ident())
        return outer is not None and outer.work is Work.STEP

    @property
    def idle(self) -> bool:
        with self._changed:
            self._forget_ended()
            return not self._running and not self._queue

    def _outermost(self, thread: int) -> Turn | None:
        return next((turn for turn in self._running if turn.thread == thread and not turn.is_over), None)

    def _in_the_way(self, turn: Turn) -> list[Turn]:
        return [other for other in self._running if other.work is not turn.work and not other.is_over]

    def _wait(self, turn: Turn) -> None:
        deadline = time.monotonic() + self._timeout_s
        self._queue.append(turn)
        try:
            while self._in_the_way(turn) or any(
                before.work is not turn.work for before in self._queue[: self._queue.index(turn)]
            ):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise BackpressureTimeout(self._complaint(turn))
                self._changed.wait(min(left_s, _LOOK_AGAIN_S))
        finally:
            self._queue.remove(turn)
            self._changed.notify_all()

    def _complaint(self, turn: Turn) -> str:
        # One that waits in the queue is no culprit.
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        others = [names.get(other.thread, f"thread {other.thread}") for other in self._in_the_way(turn)]
        is_step = turn.work is Work.STEP
        outcome = "the step was not started" if is_step else "nothing of this file was written"
        where = f" on {', '.join(map(repr, others))}" if others else ""
        return (
            f"{turn.work.value} of a guarded optimizer waited {self._timeout_s:g} s for "
            f"{(Work.SAVE if is_step else Work.STEP).value}{where} to end; {outcome}. Do not let a step wait for "
            "the thread that saves"
        )

    def _forget_ended(self) -> None:
        self._running = [turn for turn in self._running if not turn.is_over]
