"""The pending mirror: what `pending.mirrored` is."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Generator
from concurrent.futures import Future

from ..errors import BackpressureTimeout
from ..metrics import MirrorMetrics
from ..threads.locks import Lock


class PendingMirror:
    """A committed checkpoint on its way to its mirrors.

    Guarantees:
    - Resolves exactly once: to the tag, when every mirror has it, or to the first failure once all have ended.
    - Giving up waiting never cancels the upload. Any thread, any event loop, any number of times.
    """

    def __init__(self, tag: str, urls: tuple[str, ...]) -> None:
        self.tag = tag
        self._future: Future[str] = Future()
        self._future.set_running_or_notify_cancel()
        self._lock = Lock()
        self._left = {url: MirrorMetrics(tag, url) for url in urls}
        self._ended: list[MirrorMetrics] = []
        self._failure: BaseException | None = None
        self._acknowledged = False

    @property
    def metrics(self) -> MirrorMetrics:
        """What has been sent up to now, summed over the mirrors; times are those of the slowest."""
        with self._lock:
            known = [*self._left.values(), *self._ended]
        total = MirrorMetrics(self.tag)
        for name in ("size_bytes", "num_objects", "num_parts", "sent_bytes"):
            setattr(total, name, sum(getattr(one, name) for one in known))
        for name in ("wait_s", "upload_s"):
            setattr(total, name, max((getattr(one, name) for one in known), default=0.0))
        return total

    @property
    def acknowledged(self) -> bool:
        """Whether somebody has asked for the outcome."""
        return self._acknowledged

    def result(self, timeout: float | None = None) -> str:
        """Block until every mirror has the checkpoint; returns the tag.

        Raises:
            BackpressureTimeout: not within `timeout` seconds; the upload goes on.
            CheckpointError: the first failure. The checkpoint on disk is whole.
        """
        error = self.exception(timeout)
        if error is not None:
            raise error
        return self.tag

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until it ended; returns its failure, or None. Raises `BackpressureTimeout` like `result`."""
        try:
            error = self._future.exception(timeout)
        # On Python 3.10 this is not the builtin TimeoutError.
        except concurrent.futures.TimeoutError:
            left = ", ".join(self._left)
            raise BackpressureTimeout(
                f"the mirroring of {self.tag!r} did not end within {timeout:g} s and goes on; missing: {left}. It is whole on disk"
            ) from None
        self._acknowledged = True
        return error

    def done(self) -> bool:
        """Whether it has ended, well or badly. Never blocks."""
        return self._future.done()

    def add_done_callback(self, callback: Callable[[PendingMirror], object]) -> None:
        """Call `callback(self)` once it ended, on the mirror's thread, or here and now when it has; it must be quick."""
        self._future.add_done_callback(lambda _: callback(self))

    def __await__(self) -> Generator[object, None, str]:
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

    def __repr__(self) -> str:
        state = "pending" if not self.done() else ("mirrored" if self._future.exception() is None else "failed")
        return f"<PendingMirror {self.tag!r} {state}>"

    # The mirrors' side.

    def wait(self, timeout_s: float | None) -> bool:
        """Block up to `timeout_s` seconds; True when ended. Does not mark the outcome as asked for."""
        done, _ = concurrent.futures.wait([self._future], timeout=None if timeout_s is None else max(0.0, timeout_s))
        return bool(done)

    def failure(self) -> BaseException | None:
        """The failure of an ended one, without marking it as asked for."""
        return self._future.exception() if self._future.done() else None

    def metrics_of(self, url: str) -> MirrorMetrics:
        """Where the upload to one mirror is measured."""
        with self._lock:
            return self._left.get(url) or MirrorMetrics(self.tag, url)

    def ended(self, url: str, error: BaseException | None) -> None:
        """One mirror has ended; a second word about the same mirror does nothing."""
        with self._lock:
            metrics = self._left.pop(url, None)
            if metrics is None:
                return
            self._ended.append(metrics)
            self._failure = self._failure or error
            if self._left:
                return
        if self._failure is None:
            self._future.set_result(self.tag)
        else:
            self._future.set_exception(self._failure)

    def fail(self, error: BaseException) -> None:
        """End it for all mirrors: there is nothing to be mirrored, or nobody who does it."""
        for url in tuple(self._left):
            self.ended(url, error)
