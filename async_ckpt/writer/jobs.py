"""The jobs of one file on I/O threads: timed, told, and counted until their threads have left them.

A cancelled ``await`` says nothing about the thread behind it: memory and descriptors may be given up only when no job
is left.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from ..metrics import Span
from ..threads.executor import DaemonExecutor
from ..threads.locks import Lock

T = TypeVar("T")


class Jobs(Executor):
    """An executor that remembers. Any thread; never blocks.

    Args:
        on_span: told about each timed piece of work, on the thread that did it.
        tag: goes into spans.
    """

    def __init__(self, io: DaemonExecutor, on_span: Callable[[Span], None] | None, tag: str) -> None:
        self.path = ""
        self.step = "its turn"
        """What the file's task waits for, or does next."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """By kind of work, summed over threads: may exceed wall time."""
        self._io = io
        self._on_span = on_span
        self._tag = tag
        self._lock = Lock()
        self._num_left = 0
        self._callbacks: list[Callable[[], None]] = []
        self._running: dict[object, tuple[str, int, int, float]] = {}

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn`, timed as the `step` that the file's task is at: for ``open_write`` and what it returns."""
        step = self.step
        return self.run(lambda: self.timed(step, 0, 0, lambda: fn(*args, **kwargs)))

    def run(self, fn: Callable[[], T]) -> Future[T]:
        """Run `fn`, counted. Raises TransactionStateError: the threads are gone."""
        with self._lock:
            self._num_left += 1
        try:
            job = self._io.submit(fn)
        except BaseException:
            self._ended()
            raise
        job.add_done_callback(lambda _: self._ended())
        return job

    def timed(self, kind: str, offset: int, num_bytes: int, fn: Callable[[], T]) -> T:
        """Do `fn` here and now, which is a piece of work on these bytes of the file."""
        key, start_s = object(), time.perf_counter()
        with self._lock:
            self._running[key] = kind, offset, num_bytes, start_s
        try:
            return fn()
        finally:
            end_s = time.perf_counter()
            with self._lock:
                del self._running[key]
                self.seconds[kind] += end_s - start_s
            if self._on_span is not None:
                thread = threading.current_thread().name
                self._on_span(Span(kind, start_s, end_s, thread, self._tag, self.path, offset, num_bytes))

    @property
    def is_idle(self) -> bool:
        return self._num_left == 0

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call `callback` once idle: here and now, or in the thread that ends the last job. It must not raise."""
        with self._lock:
            if self._num_left:
                self._callbacks.append(callback)
                return
        callback()

    def waits_for(self, path: str) -> str:
        """What the file at `path` waits for now, in words."""
        # Without the lock, which I/O threads want: this thread may be interrupted by a handler that waits for them.
        running = list(self._running.values())
        if not running:
            return f"{self.step} of {path!r}"
        kind, offset, num_bytes, start_s = running[0]
        what = f"{kind} of {num_bytes} bytes at offset {offset}" if num_bytes else kind
        return f"{what} of {path!r}, running for {time.perf_counter() - start_s:.1f} s"

    def _ended(self) -> None:
        with self._lock:
            self._num_left -= 1
            if self._num_left:
                return
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()
