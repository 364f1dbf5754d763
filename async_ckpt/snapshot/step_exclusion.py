"""Who may go now: optimizer steps, or saves. Steps of one thread and saves of another never overlap.

Guarantees:
- While a thread has its turn for one kind of work, no other thread begins the other kind. Work of the same kind goes
  on side by side.
- A thread never waits for itself: what it begins inside its own turn (a save in a closure, an inner optimizer's step)
  is part of that turn.
- First come, first served, so that neither kind starves the other. No wait is longer than the time limit.
- A turn ends with the function that began it, however that function is left. Torch calls a step's post-hooks only when
  the step returns; one that raises tells nobody. So a turn remembers the code of the function it was begun in, and
  whoever waits for it looks whether its thread still runs that code. Nothing of the step is kept alive for this: no
  frame, no argument, no optimizer.
"""

from __future__ import annotations

import enum
import threading
import time
from dataclasses import dataclass
from types import CodeType, FrameType

from ..errors import BackpressureTimeout
from ..host.frames import calling_frame, innermost_frames
from ..threads.locks import Condition

# How soon a waiter learns that a step has raised; it is only then that nobody wakes it.
_LOOK_AGAIN_S = 0.02


class Work(enum.Enum):
    """What a turn is for."""

    STEP = "an optimizer step"
    SAVE = "a save"


@dataclass(slots=True)
class _Turn:
    work: Work
    code: CodeType
    parts: list[object]
    """Who began inside this turn and has not ended, outermost first."""


@dataclass(slots=True, eq=False)
class _Place:
    """A place in the queue; two of the same work are still two."""

    work: Work


class Turns:
    """Turns of the threads that step and save. Any thread; re-entrant, also from signal handlers and finalizers."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._changed = Condition()
        self._running: dict[int, _Turn] = {}
        self._queue: list[_Place] = []

    def begin(self, work: Work, part: object, frame: FrameType) -> None:
        """Begin `work`, or become a part of the turn this thread has; blocks while other threads do the other kind.

        Args:
            part: tells it apart from other work inside the same turn; compared by identity.
            frame: of the function that ends after `end`, or by raising instead of calling it.

        Raises:
            BackpressureTimeout: the other work did not end in time; this one has not begun.
        """
        me = threading.get_ident()
        with self._changed:
            turn = self._running.get(me)
            if turn is not None and _runs(turn.code, frame.f_back):
                turn.parts.append(part)
                return
            # What is left of a step that has raised on this thread.
            self._running.pop(me, None)
            if self._queue or self._in_the_way(work):
                self._wait(work)
            self._running[me] = _Turn(work, frame.f_code, [part])

    def end(self, part: object) -> None:
        """End what this thread began as `part`, and what has raised inside it; nothing if it had not begun."""
        me = threading.get_ident()
        with self._changed:
            turn = self._running.get(me)
            at = None if turn is None else _last_index(turn.parts, part)
            if turn is None or at is None:
                return
            del turn.parts[at:]
            if not turn.parts:
                del self._running[me]
                self._changed.notify_all()

    def in_own_step(self, frame: FrameType | None) -> bool:
        """Whether this thread, which now runs `frame`, is inside a step of its own."""
        with self._changed:
            turn = self._running.get(threading.get_ident())
        return turn is not None and turn.work is Work.STEP and _runs(turn.code, frame)

    @property
    def idle(self) -> bool:
        """Nobody has a turn, and nobody waits for one."""
        with self._changed:
            self._forget_ended()
            return not self._running and not self._queue

    def _in_the_way(self, work: Work) -> bool:
        return any(turn.work is not work for turn in self._running.values())

    def _wait(self, work: Work) -> None:
        deadline = time.monotonic() + self._timeout_s
        mine = _Place(work)
        self._queue.append(mine)
        try:
            while True:
                self._forget_ended()
                if not self._in_the_way(work) and all(p.work is work for p in self._queue[: self._queue.index(mine)]):
                    return
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise BackpressureTimeout(self._complaint(work))
                self._changed.wait(min(left_s, _LOOK_AGAIN_S))
        finally:
            self._queue.remove(mine)
            self._changed.notify_all()

    def _complaint(self, work: Work) -> str:
        # A thread that waits in the queue for its turn has none yet, so the names are those of the culprits.
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        others = [names.get(ident, f"thread {ident}") for ident, turn in self._running.items() if turn.work is not work]
        other = Work.SAVE if work is Work.STEP else Work.STEP
        outcome = "the step was not started" if work is Work.STEP else "nothing of this file was written"
        where = f" on {', '.join(map(repr, others))}" if others else ""
        return (
            f"{work.value} of a guarded optimizer waited {self._timeout_s:g} s for {other.value}{where} to end; {outcome}. "
            "Do not let a step wait for the thread that saves"
        )

    def _forget_ended(self) -> None:
        """Drop the turns whose function was left without a word."""
        if not self._running:
            return
        frames = innermost_frames()
        # A turn is entered under the lock held here, so its function was on the stack when the frames were taken.
        ended = [ident for ident, turn in self._running.items() if not _runs(turn.code, frames.get(ident))]
        for ident in ended:
            del self._running[ident]


def _runs(code: CodeType, frame: FrameType | None) -> bool:
    """Whether `code` is being executed by `frame` or one of its callers."""
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = calling_frame(frame)
    return False


def _last_index(parts: list[object], part: object) -> int | None:
    return next((k for k in range(len(parts) - 1, -1, -1) if parts[k] is part), None)
