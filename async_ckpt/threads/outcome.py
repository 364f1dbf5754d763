"""What becomes of work on other threads, for whoever waits for it; a user holds it as one object with a blocking face
and an awaitable one.

No lock is held while anybody asks, waits or tells: a signal handler may use an outcome, and wait for anything else,
wherever it has interrupted its thread. Fields change by single operations that no handler divides.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Generic, TypeVar

from ..errors import BackpressureTimeout, report
from .executor import check_process

T = TypeVar("T")
Self = TypeVar("Self", bound="Outcome[Any]")
Held = TypeVar("Held", bound="Pending")


class Outcome(Generic[T]):
    """Resolves once, to a result or an error (later ones are ignored); cannot be cancelled.

    Any thread and any event loop; refused in a forked child (`TransactionStateError`), where nobody resolves it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._ends: list[tuple[T | None, BaseException | None]] = []
        """The first one counts."""
        self._callbacks: deque[Callable[[Any], object]] = deque()
        self.acknowledged = False
        """Whether somebody has asked how it ended (`result`, `exception` or ``await``)."""

    def done(self) -> bool:
        """Whether it has resolved. Never blocks."""
        check_process(self._pid, self)
        return bool(self._ends)

    def failure(self) -> BaseException | None:
        """The error that it has resolved to; None before, and where all is well. Never blocks."""
        check_process(self._pid, self)
        return self._ends[0][1] if self._ends else None

    def wait(self, timeout_s: float | None = None) -> bool:
        """Block until it has resolved, or for `timeout_s` seconds; says whether it has."""
        check_process(self._pid, self)
        if not self._ends:
            # Known to this call alone, so that no handler finds it half taken.
            resolved = _thread.allocate_lock()
            resolved.acquire()

            def wake(_: object) -> None:
                resolved.release()

            self.when_done(wake)
            resolved.acquire(timeout=-1 if timeout_s is None else min(max(0.0, timeout_s), threading.TIMEOUT_MAX))
            with contextlib.suppress(ValueError):
                self._callbacks.remove(wake)
        return bool(self._ends)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until it has ended; its failure, or None.

        Raises:
            BackpressureTimeout: it did not end within `timeout` seconds, and goes on; says what it waits for.
        """
        if not self.wait(timeout):
            raise BackpressureTimeout(self._still_waits(f"did not end within {timeout:g} s and goes on"))
        self.acknowledged = True
        return self._ends[0][1]

    def result(self, timeout: float | None = None) -> T:
        """Block until it has resolved; its result. Raises its error, and BackpressureTimeout."""
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self._ends[0][0]  # type: ignore[return-value]

    async def ended(self) -> None:
        # Where a loop runs it is imported already; what only looks at a directory starts without it.
        import asyncio

        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        def on_done(_: object) -> None:
            # The awaiting loop may have been closed meanwhile: then nobody waits there any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(wake)

        self.when_done(on_done)
        await ended

    def __await__(self) -> Generator[Any, None, T]:
        check_process(self._pid, self)
        yield from self.ended().__await__()
        return self.result()

    def when_done(self: Self, callback: Callable[[Self], object]) -> None:
        """Call `callback(self)` once it has resolved, on the thread that resolves it, or else here and now. It must
        not raise or block."""
        check_process(self._pid, self)
        self._callbacks.append(callback)
        if self._ends:
            # Nobody calls another's here: who is interrupted in between would lose it.
            try:
                self._callbacks.remove(callback)
            except ValueError:
                return
            callback(self)

    def resolve(self, result: T | None, error: BaseException | None) -> None:
        self._ends.append((result, error))
        while self._callbacks:
            try:
                callback = self._callbacks.popleft()
            except IndexError:
                return
            callback(self)

    def _still_waits(self, what: str) -> str:
        """The message of a timeout, which says `what`; and what it waits for."""
        return f"{self!r} {what}"

    def __repr__(self) -> str:
        return "this write"


def wait_all(outcomes: Iterable[Outcome[Any]], timeout_s: float | None = None) -> bool:
    """Block until all have resolved, or for `timeout_s` seconds; says whether they have."""
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    return all(one.wait(None if deadline_s is None else deadline_s - time.monotonic()) for one in outcomes)


_unnamed: dict[Pending, str] = {}
"""What this process has pending and `name_pending` has not named yet, with the real path of its root."""


def run_guarded(call: Callable[[], object]) -> None:
    """Call the user's code here and now; what it raises, SystemExit too, is logged and harms nothing."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - foreign code: whatever it raises must not fail a checkpoint
        report(logging.ERROR, "a callback raised %r", error, cause=error)


def announce(pending: Pending, real_root: str) -> None:
    """Let `name_pending` name it until it has ended. Never asks the disk."""
    _unnamed[pending] = real_root
    pending.when_done(lambda ended: _unnamed.pop(ended, None))


def name_pending(root: str) -> None:
    """Warn, once, of each commit that this process has pending in `root`: who resumes now resumes from before it."""
    real = os.path.realpath(root)
    for pending, where in list(_unnamed.items()):
        if where == real and not pending.is_inherited and _unnamed.pop(pending, None) is not None:
            told = "the commit of %r in %r is pending in this process, and does not count yet: wait for it"
            report(logging.WARNING, told, pending.tag, root)


class Pending(Outcome[str]):
    """What happens to the checkpoint `tag`.

    Guarantees:
    - Resolves exactly once: to the tag, or to the first failure.
    - Giving up waiting (a timeout, a cancelled ``await``) never cancels what is waited for.
    - May be used from any thread and awaited from any event loop, any number of times; a forked child is refused at
      once (`TransactionStateError`): what is pending is its parent's.

    Args:
        run_callback: runs the user's callbacks; must not block or raise.
    """

    def __init__(self, tag: str, run_callback: Callable[[Callable[[], object]], object] = run_guarded) -> None:
        super().__init__()
        self.tag = tag
        self._run_callback = run_callback

    @property
    def is_inherited(self) -> bool:
        """Whether it is the parent's of this forked process."""
        return os.getpid() != self._pid

    def add_done_callback(self: Held, callback: Callable[[Held], object]) -> None:
        """Call `callback(self)` once it ended, on the engine's thread for callbacks and observers, one after the other.

        No checkpoint waits for it: it may block, and call the engine. What it raises is logged and harms nothing."""
        self.when_done(lambda _: self._run_callback(lambda: callback(self)))

    def __repr__(self) -> str:
        if self.is_inherited:
            state = f"of process {self._pid}"
        else:
            state = "pending" if not self.done() else ("done" if self.failure() is None else "failed")
        return f"<{type(self).__name__} {self.tag!r} {state}>"
