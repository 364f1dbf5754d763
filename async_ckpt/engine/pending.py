"""The pending commit: one object with a blocking face and an awaitable one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections.abc import Callable, Generator
from concurrent.futures import Future

from ..errors import BackpressureTimeout, TransactionStateError
from ..metrics import CommitMetrics
from ..mirror.pending import PendingMirror


class PendingCommit:
    """A commit on its way to the disk.

    Guarantees:
    - Resolves exactly once: to the tag, when the checkpoint is durable and visible, or to the first failure.
    - Giving up waiting (a timeout, a cancelled ``await``) never cancels the commit itself.
    - May be used from any thread and awaited from any event loop, any number of times; a forked child is refused at once
      (`TransactionStateError`): the commit is its parent's.

    A failure that nobody has asked for (`result`, `exception` or ``await``) is raised by the engine's next `create`
    and when the engine is closed.
    """

    def __init__(
        self,
        tag: str,
        metrics: CommitMetrics,
        waiting_for: Callable[[], str],
        run_callback: Callable[[Callable[[], object]], object] = lambda call: call(),
    ) -> None:
        self._pid = os.getpid()
        self.tag = tag
        self.metrics = metrics
        self.mirrored: PendingMirror | None = None
        """The same checkpoint on its way to the engine's mirrors; None where it has none."""
        self._future: Future[str] = Future()
        self._waiting_for = waiting_for
        self._run_callback = run_callback
        self._acknowledged = False
        # A running future cannot be cancelled: a stray cancel() must not look like a lost checkpoint.
        self._future.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> str:
        """Block until the checkpoint is committed; returns the tag.

        Raises:
            BackpressureTimeout: it did not end within `timeout` seconds; says what it waits for. It goes on.
            CheckpointError: the first failure (`WriteError`, `CommitError`, `TornSnapshotError`, ...).
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.tag

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until the commit ended; returns its failure, or None. Raises `BackpressureTimeout` like `result`."""
        self._check_process()
        try:
            error = self._future.exception(timeout)
        # On Python 3.10 this is not the builtin TimeoutError.
        except concurrent.futures.TimeoutError:
            raise BackpressureTimeout(
                f"commit of {self.tag!r} did not end within {timeout:g} s and goes on; it waits for {self._waiting_for()}. "
                "Nothing is visible under this tag yet"
            ) from None
        self._acknowledged = True
        return error

    def done(self) -> bool:
        """Whether the commit has ended, well or badly. Never blocks."""
        self._check_process()
        return self._future.done()

    def add_done_callback(self, callback: Callable[[PendingCommit], object]) -> None:
        """Call `callback(self)` once the commit ended, on the engine's thread for callbacks and observers, one after the other.

        No checkpoint waits for it: it may block, and call the engine. What it raises is logged and harms nothing.
        """
        self._check_process()
        self._future.add_done_callback(lambda _: self._run_callback(lambda: callback(self)))

    def __await__(self) -> Generator[object, None, str]:
        self._check_process()
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not ended.done():
                ended.set_result(None)

        def on_done(_: Future[str]) -> None:
            # The awaiting loop may have been closed meanwhile: then nobody waits there any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(wake)

        self._future.add_done_callback(on_done)
        yield from ended.__await__()
        return self.result()

    def _check_process(self) -> None:
        # Before the future's own lock, which a thread of the parent may have held.
        if os.getpid() != self._pid:
            raise TransactionStateError(
                f"the commit of {self.tag!r} belongs to process {self._pid} and goes on there; this is its forked child {os.getpid()}"
            )

    def __repr__(self) -> str:
        if os.getpid() != self._pid:
            return f"<PendingCommit {self.tag!r} of process {self._pid}>"
        state = "pending" if not self.done() else ("committed" if self._future.exception() is None else "failed")
        return f"<PendingCommit {self.tag!r} {state}>"

    # The engine's side.

    @property
    def acknowledged(self) -> bool:
        """Whether somebody has asked for the outcome."""
        return self._acknowledged

    def failure(self) -> BaseException | None:
        """The failure of an ended commit, without marking it as asked for; None while it runs."""
        self._check_process()
        return self._future.exception() if self._future.done() else None

    def wait(self, timeout_s: float | None) -> bool:
        """Block up to `timeout_s` seconds (None: until it ends); True when ended. Does not mark the outcome as asked for."""
        self._check_process()
        done, _ = concurrent.futures.wait([self._future], timeout=None if timeout_s is None else max(0.0, timeout_s))
        return bool(done)

    async def ended(self) -> None:
        """Wait until it has ended, however. Does not mark the outcome as asked for."""
        await asyncio.wait([asyncio.wrap_future(self._future)])

    def resolve(self, error: BaseException | None) -> None:
        """End it: `error` is None when the checkpoint is committed."""
        if error is None:
            self._future.set_result(self.tag)
        else:
            self._future.set_exception(error)
