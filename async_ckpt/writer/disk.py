"""What the files of one pool share: the seam to the disk, the threads, the slots, the count of chunks; and the jobs of
one file on these threads."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from ..metrics import Span
from ..storage.filesystem import FileSystem
from ..threads.executor import DaemonExecutor
from ..threads.locks import Lock
from ..threads.loop import LoopThread

T = TypeVar("T")

PAGE_BYTES = 4096
MakeRoom = Callable[[str], Coroutine[Any, Any, None]]


class Disk:
    """What the files of one pool share, as that takes it; a slot for each chunk that may be written at once. Any
    thread, but for slots no user's; nothing blocks."""

    def __init__(
        self,
        filesystem: FileSystem,
        io: DaemonExecutor,
        loop: LoopThread,
        num_slots: int,
        on_span: Callable[[Span], None] | None,
        make_room: MakeRoom | None,
    ) -> None:
        self.filesystem = filesystem
        self.io = io
        self.loop = loop
        self.on_span = on_span
        self.make_room = make_room
        self.num_queued = 0
        """Chunks submitted and not yet released."""
        self._max_queued = 0
        self._lock = Lock()
        self._num_free_slots = num_slots
        self._waiting: dict[Callable[[], None], None] = {}

    def take_slot(self, try_again: Callable[[], None]) -> bool:
        """Take a slot; False when there is none: `try_again` is called once there is one, first come, first served."""
        with self._lock:
            if self._num_free_slots:
                self._num_free_slots -= 1
                return True
            self._waiting[try_again] = None
            return False

    def give_slot_back(self) -> None:
        """Let those who wait try again while there is one."""
        with self._lock:
            self._num_free_slots += 1
        while True:
            with self._lock:
                try_again = next(iter(self._waiting), None) if self._num_free_slots else None
                if try_again is None:
                    return
                del self._waiting[try_again]
            try_again()

    def count(self, change: int) -> None:
        """Chunks were taken over (+) or released (-)."""
        with self._lock:
            self.num_queued += change
            self._max_queued = max(self._max_queued, self.num_queued)

    def restart_max_queued(self) -> int:
        """The most chunks that were queued since this was last asked."""
        with self._lock:
            most, self._max_queued = self._max_queued, self.num_queued
        return most


class Jobs(Executor):
    """The jobs of one file on I/O threads: timed, told, and counted until their threads have left them, of which a
    cancelled ``await`` says nothing. Any thread; never blocks."""

    def __init__(self, disk: Disk, name: str, tag: str) -> None:
        self.path = name
        self.step = "its turn"
        """What the file's task waits for, or does next."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """By kind of work, summed over threads: may exceed wall time."""
        self._disk = disk
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
            job = self._disk.io.submit(fn)
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
            if (on_span := self._disk.on_span) is not None:
                thread = threading.current_thread().name
                on_span(Span(kind, start_s, end_s, thread, self._tag, self.path, offset, num_bytes))

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

    def waits_for(self) -> str:
        """What the file waits for now, in words."""
        # Without the lock, which I/O threads want: this thread may be interrupted by a handler that waits for them.
        running = list(self._running.values())
        if not running:
            return f"{self.step} of {self.path!r}"
        kind, offset, num_bytes, start_s = running[0]
        what = f"{kind} of {num_bytes} bytes at offset {offset}" if num_bytes else kind
        return f"{what} of {self.path!r}, running for {time.perf_counter() - start_s:.1f} s"

    def _ended(self) -> None:
        with self._lock:
            self._num_left -= 1
            if self._num_left:
                return
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()


def whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
