"""Something that is on its way, as its user holds it: one object with a blocking face and an awaitable one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import BackpressureTimeout, TransactionStateError, report

P = TypeVar("P", bound="Pending")


def run_guarded(call: Callable[[], object]) -> None:
    """Call the user's code here and now; what it raises, SystemExit too, is logged and harms nothing."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - foreign code: whatever it raises must not fail a checkpoint
        report(logging.ERROR, "a callback raised %r", error, cause=error)


class Pending:
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
        self.tag = tag
        self._pid = os.getpid()
        self._future: Future[str] = Future()
        self._run_callback = run_callback
        self._acknowledged = False
        # A running future cannot be cancelled: a stray cancel() must not look like a lost checkpoint.
        self._future.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> str:
        """Block until it ended well; returns the tag.

        Raises:
            BackpressureTimeout: it did not end within `timeout` seconds; says what it waits for. It goes on.
            CheckpointError: its first failure.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.tag

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until it ended; returns its failure, or None. Raises `BackpressureTimeout` like `result`."""
        self._check_process()
        try:
            error = self._future.exception(timeout)
        # On Python 3.10 this is not the builtin TimeoutError.
        except concurrent.futures.TimeoutError:
            raise BackpressureTimeout(self._still_waits(f"did not end within {timeout:g} s and goes on")) from None
        self._acknowledged = True
        return error

    def done(self) -> bool:
        """Whether it has ended, well or badly. Never blocks."""
        self._check_process()
        return self._future.done()

    def add_done_callback(self: P, callback: Callable[[P], object]) -> None:
        """Call `callback(self)` once it ended, on the engine's thread for callbacks and observers, one after the other.

        No checkpoint waits for it: it may block, and call the engine. What it raises is logged and harms nothing.
        """
        self._check_process()
        self._future.add_done_callback(lambda _: self._run_callback(lambda: callback(self)))

    def __await__(self) -> Generator[Any, None, str]:
        self._check_process()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        def on_done(_: Future[str]) -> None:
            # The awaiting loop may have been closed meanwhile: then nobody waits there any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(wake)

        self._future.add_done_callback(on_done)
        yield from ended.__await__()
        return self.result()

    def __repr__(self) -> str:
        if os.getpid() != self._pid:
            state = f"of process {self._pid}"
        else:
            state = "pending" if not self.done() else ("done" if self._future.exception() is None else "failed")
        return f"<{type(self).__name__} {self.tag!r} {state}>"

    def _still_waits(self, what: str) -> str:
        """The message of a timeout, which says `what`; and what it waits for."""
        return f"{self!r} {what}"

    def _check_process(self) -> None:
        # Before the future's own lock, which a thread of the parent may have held.
        if os.getpid() != self._pid:
            raise TransactionStateError(f"{self!r} goes on there; this is its forked child {os.getpid()}")

    # The side of whoever resolves it.

    @property
    def acknowledged(self) -> bool:
        """Whether somebody has asked for the outcome."""
        return self._acknowledged

    def failure(self) -> BaseException | None:
        """The failure of an ended one, without marking it as asked for; None while it runs."""
        self._check_process()
        return self._future.exception() if self._future.done() else None

    def wait(self, timeout_s: float | None) -> bool:
        """Block up to `timeout_s` seconds (None: until it ends); True when ended. Does not mark the outcome as asked
        for.
        """
        self._check_process()
        done, _ = concurrent.futures.wait([self._future], timeout=None if timeout_s is None else max(0.0, timeout_s))
        return bool(done)

    async def ended(self) -> None:
        """Wait until it has ended, however. Does not mark the outcome as asked for."""
        await asyncio.wait([asyncio.wrap_future(self._future)])

    def resolve(self, error: BaseException | None) -> None:
        """End it: `error` is None when all is well."""
        if error is None:
            self._future.set_result(self.tag)
        else:
            self._future.set_exception(error)
