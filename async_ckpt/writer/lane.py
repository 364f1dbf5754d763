"""Waiting that tells the truth: which jobs have really ended, whatever was cancelled on the waiting side.

Guarantees:
- A `Lane` counts a job as pending until its thread has left it.
- An `Outcome` resolves once, cannot be cancelled, and refuses to be waited for in a forked child.
- `ended` never cancels what it waits for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future, InvalidStateError
from contextvars import ContextVar
from typing import Any, TypeVar

from ..metrics import Span
from ..threads.executor import check_process
from ..threads.locks import Lock

T = TypeVar("T")

# What the jobs submitted from the current task are: (kind, offset, num_bytes).
job_label: ContextVar[tuple[str, int, int]] = ContextVar("job_label", default=("file", 0, 0))


class Lane(Executor):
    """One file's way into the executors: times its jobs and knows when none is in a thread any more.

    A cancelled ``await`` says nothing about the thread behind it; memory and descriptors may be given up only once
    `is_idle`. Any thread.
    """

    def __init__(self, executor: Executor, on_span: Callable[[Span], None] | None, tag: str) -> None:
        self.path = ""
        self.seconds: dict[str, float] = {}
        self._executor = executor
        self._on_span = on_span
        self._tag = tag
        self._lock = Lock()
        self._num_pending = 0
        self._callbacks: list[Callable[[], None]] = []
        self._running: dict[object, tuple[str, int, int, float]] = {}

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn` in the pool's write threads, labelled by `job_label` of the calling context."""
        return self.submit_to(self._executor, fn, *args, **kwargs)

    def submit_to(self, executor: Executor, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn` in `executor`, counted and timed here."""
        label = job_label.get()
        future = executor.submit(self._timed, label, fn, args, kwargs)
        with self._lock:
            self._num_pending += 1
        future.add_done_callback(self._ended)
        return future

    @property
    def is_idle(self) -> bool:
        """Whether none of its jobs is queued or in a thread."""
        with self._lock:
            return self._num_pending == 0

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call `callback` once idle: here and now, or in the thread that ends the last job. It must not raise."""
        with self._lock:
            if self._num_pending:
                self._callbacks.append(callback)
                return
        callback()

    def oldest(self) -> str | None:
        """The job that has been in a thread for longest, in words; None when there is none."""
        with self._lock:
            if not self._running:
                return None
            kind, offset, num_bytes, start_s = next(iter(self._running.values()))
        what = f"{kind} of {num_bytes} bytes at offset {offset}" if num_bytes else kind
        return f"{what} of {self.path!r}, running for {time.perf_counter() - start_s:.1f} s"

    def _timed(self, label: tuple[str, int, int], fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        kind, offset, num_bytes = label
        key, start_s = object(), time.perf_counter()
        with self._lock:
            self._running[key] = (kind, offset, num_bytes, start_s)
        try:
            return fn(*args, **kwargs)
        finally:
            end_s = time.perf_counter()
            with self._lock:
                del self._running[key]
                self.seconds[kind] = self.seconds.get(kind, 0.0) + end_s - start_s
            if self._on_span is not None:
                thread = threading.current_thread().name
                self._on_span(Span(kind, start_s, end_s, thread, self._tag, self.path, offset, num_bytes))

    def _ended(self, _: Future[Any]) -> None:
        with self._lock:
            self._num_pending -= 1
            if self._num_pending:
                return
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


class Outcome(Future[T]):
    """A future of the pool's: cannot be cancelled, resolves once (later outcomes are ignored), refuses waits after a fork."""

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()
        self.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> T:
        check_process(self._pid, "this write")
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        check_process(self._pid, "this write")
        return super().exception(timeout)

    def resolve(self, result: T | None, error: BaseException | None) -> None:
        """Set the outcome unless there is one: a pool that dies may race with the end of a file."""
        with contextlib.suppress(InvalidStateError):
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(result)  # type: ignore[arg-type]


class Slots:
    """A first-come-first-served count of writes in flight; loop thread only.

    Not `asyncio.Semaphore`: in Python 3.10 a cancelled waiter can swallow another's wake-up.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_free = num_slots
        self._waiters: deque[asyncio.Future[None]] = deque()

    async def acquire(self) -> None:
        """Take a slot, waiting for one."""
        if self._num_free > 0:
            self._num_free -= 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Hand the slot to the first that still waits."""
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._num_free += 1


async def ended(future: Future[T]) -> T:
    """The result of somebody else's future; unlike ``asyncio.wrap_future``, a cancelled wait leaves it alone."""
    if not future.done():
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        future.add_done_callback(lambda _: wake(loop, done))
        await done
    return future.result()


def wake(loop: asyncio.AbstractEventLoop, done: asyncio.Future[None]) -> None:
    """Resolve `done` on its loop, from any thread; a loop that is gone has nobody waiting."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(lambda: None if done.done() else done.set_result(None))
