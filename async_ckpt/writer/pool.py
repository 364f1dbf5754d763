"""The asyncio writer pool: one daemon thread with one event loop, and I/O threads, put staging chunks on disk.

Guarantees:
- `open_file`, `FileWrite.submit`, `submit_io` and `run` never block; what they start always resolves.
- At most `num_writers` chunks are written at once over all files; fsync of a file starts as soon as its data is
  written.
- When the loop thread dies, is stopped from outside or loses its executors, every outstanding future fails at once
  with an error of our tree that holds the cause, and every later call raises it. Memory is still given back only when
  no thread uses it.
- Nothing here keeps the interpreter from exiting; whoever wants the writes finished calls `close`, which is bounded.
- A forked child is refused by every call and touches nothing of its parent's.
"""

from __future__ import annotations

import contextlib
import os
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, Literal, TypeVar

from ..errors import BackpressureTimeout, CheckpointError, TransactionStateError, WriteError
from ..format.shares import Share
from ..metrics import Span
from ..storage.filesystem import FileSystem
from ..threads.executor import DaemonExecutor, check_process, lower_priority
from ..threads.loop import LoopThread
from ..threads.outcome import Outcome, wait_all
from .chunks import HowToWrite
from .disk import Disk, MakeRoom
from .file import FileWrite
from .sharing import FindOlder

T = TypeVar("T")

SMALL_BYTES = 1 << 20
"""Files under this go through the cache: alignment and preallocation cost more than they bring."""
# Writes through the cache hold the inode's lock: while one runs, the next chunk is sealed.
_BUFFERED_DEPTH = 2
MAX_WRITERS = 16
_MIN_WRITERS = 4
# For whatever is no write of a chunk: opening, syncing and closing never wait behind long writes.
_NUM_SPARE_THREADS = 1
# The loop, the copy thread, and the engine's thread for callbacks.
_NUM_OTHER_THREADS = 3
_MAX_THREADS = 21

_pools: weakref.WeakSet[WriterPool] = weakref.WeakSet()
_inherited: list[WriterPool] = []
# Collecting a parent's loop in the child would close or unregister descriptors of an epoll set that both share.
os.register_at_fork(after_in_child=lambda: _inherited.extend(_pools))


def auto_num_writers(num_helpers: int) -> int:
    """As many as a disk makes use of, beside so many threads that copy, without crowding the process."""
    return max(_MIN_WRITERS, min(MAX_WRITERS, _MAX_THREADS - _NUM_OTHER_THREADS - _NUM_SPARE_THREADS - num_helpers))


class WriterPool:
    """Writes files from chunks. Any thread but the pool's own; only `close` blocks.

    Args:
        num_writers: chunks that are written at once, over all files.
        num_helpers: threads in `helpers`.
        io_mode: past the page cache, through it, or "auto": past it from `SMALL_BYTES` on.
        rewrite: write a file once more where the disk has failed for a moment.
        make_room: waits until commits before that of a tag, and what they delete, are over; None where nobody can.
        on_span: told about every crc, write, fsync, open and close, on the thread that did it; quick, never raises.
        name: prefix of the thread names.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        *,
        num_writers: int | Literal["auto"] = "auto",
        num_helpers: int = 0,
        io_mode: Literal["auto", "direct", "buffered"] = "auto",
        rewrite: bool = False,
        make_room: MakeRoom | None = None,
        on_span: Callable[[Span], None] | None = None,
        name: str = "async-ckpt",
    ) -> None:
        self._pid = os.getpid()
        self._io_mode, self._rewrites = io_mode, rewrite
        self._num_writers = auto_num_writers(num_helpers) if num_writers == "auto" else num_writers
        self.death: Outcome[None] = Outcome()
        """Resolves to the error that every later call raises, when the loop has died and all files have been told."""
        self._is_closing = False
        self._files: dict[FileWrite, None] = {}
        """That have not settled."""
        with contextlib.ExitStack() as undo:
            self._thread = LoopThread(f"{name}-loop", on_death=self._die, on_undrained=self._abandon_files)
            undo.callback(self._thread.loop.close)

            def start(what: str, num_threads: int, **how: Any) -> DaemonExecutor:
                executor = DaemonExecutor(f"{name}-{what}", num_threads, **how)
                undo.callback(executor.shutdown)
                return executor

            in_background = partial(lower_priority, also_disk=False)
            self._io = start("io", self._num_writers + _NUM_SPARE_THREADS, on_start=in_background)
            self.copier = start("copy", 1)
            """One thread, for what a save leaves to be copied: first in first out."""
            self.helpers = start("help", num_helpers)
            """For what helps a caller with what it waits for."""
            self._executors = (self._io, self.copier, self.helpers)
            self.disk = Disk(filesystem, self._io, self._thread, self._num_writers, on_span, make_room)
            self._thread.start()
            undo.pop_all()
        _pools.add(self)

    # The caller's side.

    def open_file(
        self,
        path: str,
        *,
        folder: Future[str] | None = None,
        size_bytes: int,
        seal: Callable[[int, memoryview], int],
        tag: str = "",
        older: FindOlder | None = None,
        pass_over: Callable[[int, memoryview], int] | None = None,
        share: Share | None = None,
    ) -> FileWrite:
        """Start a file of `size_bytes` bytes at `path`, whose missing parent directories are made. Never blocks.

        Args:
            folder: what `path` is relative to, once that is made.
            seal: called once per chunk, strictly in file order, with (offset, its bytes) on an I/O thread; may patch
                the bytes; returns the CRC32 of the extent as it is to be written.
            tag: goes into spans.
            older: finds, on an I/O thread, the committed file whose equal chunks are shared instead of written.
            pass_over: called instead of `seal` for chunks whose bytes are in that file alone.
            share: which chunks are handed over, and which of those written, where other processes write the rest; it is
                not written once more.

        Raises:
            TransactionStateError: closed, or in a forked child.
            WriteError: the pool has died; holds the cause.
        """
        self.check()
        is_direct = self._io_mode == "direct" or (self._io_mode == "auto" and size_bytes >= SMALL_BYTES)
        depth = self._num_writers if is_direct else _BUFFERED_DEPTH
        if folder is None:
            folder = Future()
            folder.set_result("")
        how = HowToWrite(is_direct, depth, self._rewrites and share is None, tag, older, pass_over, share)
        file = FileWrite(self.disk, folder, path, size_bytes, seal, how)
        # Before the pool is looked at, and without a lock: when it dies or closes from here on, it finds this one.
        self._files[file] = None
        try:
            self.check()
            file.settled.when_done(lambda _: self._files.pop(file, None))
            self._thread.call(file.start)
        except BaseException as error:
            # An interrupt in between: a file that was never started must not be waited for, one that was must end.
            self._files.pop(file, None)
            file.abort(error)
            raise
        return file

    def submit_io(self, fn: Callable[[], T]) -> Future[T]:
        """Run `fn`, which may block on the disk, on an I/O thread. Never blocks; raises as `open_file` does."""
        self.check(takes_files=False)
        return self._io.submit(fn)

    def let_go(self) -> bool:
        """Have one file give back the chunks that it only keeps for a second try; False where none does. Never
        blocks."""
        return any(file.let_go() for file in list(self._files))

    def run(self, coro: Coroutine[Any, Any, T]) -> Outcome[T]:
        """Run a coroutine on the loop; blocking in it stops all writing. Never blocks; raises as `open_file` does."""
        try:
            self.check()
        except BaseException:
            coro.close()
            raise
        return self._thread.run(coro)

    def waiting_for(self) -> str:
        """What the oldest unfinished file waits for, in words; never blocks."""
        check_process(self._pid, "this writer pool")
        files, num_runs = list(self._files), len(self._thread.runs())
        if not files:
            return f"{num_runs} commit(s) or clean-up(s)" if num_runs else "nothing"
        more = f", and {len(files) - 1} more file(s)" if len(files) > 1 else ""
        return files[0].waiting_for() + more

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for every file and coroutine, then stop and join the threads; may be called again. Files that lack
        chunks fail.

        Raises:
            BackpressureTimeout: not done within `timeout_s` seconds; says what it waits for. Writes go on in the
                background, and the process may exit.
            TransactionStateError: called on the loop's own thread or in a forked child.
        """
        check_process(self._pid, "this writer pool")
        if self._thread.is_current:
            raise TransactionStateError(
                "the writer pool cannot be closed from its own thread: it would wait for itself"
            )
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._is_closing = True
        files = list(self._files)
        for file in files:
            self._thread.call(file.expect_no_more)
        with contextlib.suppress(CheckpointError):
            # What was asked of the loop before this has begun then.
            self._thread.run(_nothing()).wait(_left(deadline))
        if not wait_all([*(file.done for file in files), *self._thread.runs()], _left(deadline)):
            raise BackpressureTimeout(f"the writer did not end within {timeout_s} s; it waits for {self.waiting_for()}")
        self._thread.stop()
        if not self._thread.join(_left(deadline)):
            raise BackpressureTimeout(
                f"the writer's thread did not end within {timeout_s} s; it waits for {self.waiting_for()}"
            )
        for executor in self._executors:
            executor.shutdown(wait=False)
        if not all(executor.join(_left(deadline)) for executor in self._executors):
            raise BackpressureTimeout(
                f"the writer's threads did not end within {timeout_s} s: one is stuck in the system"
            )

    def check(self, *, takes_files: bool = True) -> None:
        """Raise what keeps files from being written, as `open_file` does; unless it `takes_files`, only what keeps the
        threads from working for those that were begun."""
        check_process(self._pid, "this writer pool")
        for executor in self._executors:
            if executor.refusal is not None and not self._is_closing:
                raise WriteError(f"the checkpoint writer is dead: {executor.refusal}") from executor.refusal
        if takes_files and self._thread.death is not None:
            raise self._thread.death
        if takes_files and self._is_closing:
            raise TransactionStateError("the writer pool is closed")

    # Inside.

    def _die(self, death: BaseException) -> None:
        for file in list(self._files):
            file.die(death)
        self.death.resolve(None, death)

    def _abandon_files(self) -> None:
        for file in list(self._files):
            file.abandon()


async def _nothing() -> None:
    pass


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
