"""One file as its caller holds it: takes chunks in order, keeps the first failure, owns the memory until it is given back.

Guarantees:
- Every chunk is released exactly once, and only when no seal or write can touch its memory any more.
- The first failure stays, as an error of our tree with its cause; `FileWrite.done` always resolves.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from ..errors import CheckpointError, TransactionStateError, WriteError
from ..threads.executor import check_process
from ..threads.locks import Lock
from .lane import Outcome


@dataclass(slots=True)
class Chunk:
    """One unit of work: the extent `[offset, offset + nbytes)` of a file, in staging memory.

    `buffer` is page-aligned and holds at least `nbytes` rounded up to 4096; the writer may zero what lies between.
    Nobody else touches it meanwhile. `release` is called exactly once, on any thread, after the last touch: written or
    given up. It must not raise.
    """

    offset: int
    nbytes: int
    buffer: memoryview
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What is on disk, synced: `extent_crc32[k]` covers bytes `[k * extent_bytes, (k + 1) * extent_bytes)`.

    `crc_s`, `write_s` are sums over chunks and may exceed wall time; `durable_s` is the `time.perf_counter()` at
    which the file was synced.
    """

    path: str
    size_bytes: int
    extent_bytes: int
    extent_crc32: tuple[int, ...]
    direct: bool
    crc_s: float
    write_s: float
    sync_s: float
    durable_s: float


class FileWrite:
    """One file on its way to the disk, made by `WriterPool.open_file`. Any thread; never blocks.

    Args:
        on_change: called, on any thread, after a chunk was queued or `failure` was set.
        count: called with +1 and -1 as chunks are taken over and released.
    """

    def __init__(
        self, location: str | Future[str], size_bytes: int, *, on_change: Callable[[], None], count: Callable[[int], None]
    ) -> None:
        self.done: Outcome[WrittenFile] = Outcome()
        self.location = location
        self.size_bytes = size_bytes
        self.extent_bytes = 0
        self.written_bytes = 0
        self._on_change = on_change
        self._count = count
        self._pid = os.getpid()
        self._lock = Lock()
        self._held: dict[int, Chunk] = {}
        self._queue: deque[Chunk] = deque()
        self._next_offset = 0
        self._failure: BaseException | None = None
        self._is_sealed = False

    def submit(self, *chunks: Chunk) -> None:
        """Hand over the next chunks (ascending, without gaps, equal sizes except the last).

        They are taken over in every case, and released exactly once. A file that has failed takes no harm from
        further chunks: they are released, and `done` has the failure.

        Raises:
            TransactionStateError: out of order or past the end (this fails the file), or in a forked child.
        """
        check_process(self._pid, "this file")
        problems = [self._take_over(chunk) for chunk in chunks]
        # Once for all of them: to wake the loop costs more than to queue a chunk.
        self._on_change()
        for chunk, problem in zip(chunks, problems, strict=True):
            if problem is not None:
                error = TransactionStateError(f"chunk of {chunk.nbytes} bytes at offset {chunk.offset} of {self.path}: {problem}")
                self.abort(error)
                raise error

    def _take_over(self, chunk: Chunk) -> str | None:
        """Queue it, or release it: what is wrong with it, or None."""
        with self._lock:
            is_over = self._failure is not None or self._is_sealed
            problem = None if is_over else self._problem_with(chunk)
            is_taken = problem is None and not is_over
            if is_taken:
                self.extent_bytes = self.extent_bytes or chunk.nbytes
                # First of all: from here on it is given back with the others, whatever interrupts this thread.
                self._held[chunk.offset] = chunk
                self._next_offset += chunk.nbytes
                self._count(+1)
                self._queue.append(chunk)
        if not is_taken:
            chunk.release()
        return problem

    def has_taken(self, offset: int) -> bool:
        """Whether the chunk at `offset` was taken over: then it is released here, now or later."""
        with self._lock:
            return offset in self._held or offset < self._next_offset

    def abort(self, error: BaseException) -> None:
        """Give the file up: `done` fails with `error`, unless the file has ended or failed, after its writes in flight."""
        check_process(self._pid, "this file")
        if not self.fail(error, keep=True):
            # Whoever failed it first may have been interrupted before the loop was told.
            self._on_change()

    @property
    def path(self) -> str:
        """Where the file is, as far as that is known yet."""
        location = self.location
        if isinstance(location, str):
            return repr(location)
        if location.done() and not location.cancelled() and location.exception() is None:
            return repr(location.result())
        return "a file of a staging directory that is still being made"

    @property
    def submitted_bytes(self) -> int:
        """How much of it was handed over; `written_bytes` of that were written."""
        return self._next_offset

    @property
    def lacks_chunks(self) -> bool:
        """Whether the caller has not submitted all of it yet."""
        return self._next_offset < self.size_bytes

    # The pool's side.

    @property
    def failure(self) -> BaseException | None:
        """The first failure."""
        return self._failure

    def fail(self, error: BaseException, *, keep: bool = False) -> bool:
        """Remember `error` if it is the first, as one of our tree unless `keep`; says whether it was."""
        with self._lock:
            if self._failure is not None or self._is_sealed:
                return False
            # What is no Exception (KeyboardInterrupt) would end every event loop that awaits it.
            self._failure = error if keep and isinstance(error, Exception) else _in_our_tree(error, self.path)
        self._on_change()
        return True

    def seal(self) -> BaseException | None:
        """The outcome is decided now: no failure and no chunk is taken from here on."""
        with self._lock:
            self._is_sealed = True
            return self._failure

    def take(self) -> Chunk | None:
        """The next chunk to be written, if it is there."""
        with self._lock:
            return self._queue.popleft() if self._queue else None

    def release(self, offset: int) -> None:
        """Give one chunk back; no thread may use it any more."""
        with self._lock:
            chunk = self._held.pop(offset, None)
        if chunk is not None:
            self._count(-1)
            chunk.release()

    def release_all(self) -> None:
        """Give everything back; as `release`."""
        with self._lock:
            self._queue.clear()
            offsets = list(self._held)
        for offset in offsets:
            self.release(offset)

    def _problem_with(self, chunk: Chunk) -> str | None:
        if chunk.offset != self._next_offset:
            return f"out of order, the next offset is {self._next_offset}"
        end = chunk.offset + chunk.nbytes
        if end > self.size_bytes or (chunk.nbytes == 0 and self.size_bytes > 0):
            return f"the file has {self.size_bytes} bytes"
        if self.extent_bytes and chunk.nbytes != self.extent_bytes and (end != self.size_bytes or chunk.nbytes > self.extent_bytes):
            return f"all chunks but the last must have {self.extent_bytes} bytes"
        if chunk.buffer.nbytes < chunk.nbytes:
            return f"its buffer has only {chunk.buffer.nbytes} bytes"
        return None


def _in_our_tree(error: BaseException, path: str) -> BaseException:
    if isinstance(error, CheckpointError):
        return error
    reason = "a writer task was cancelled" if isinstance(error, asyncio.CancelledError) else repr(error)
    code = error.errno if isinstance(error, OSError) else None
    failure = WriteError(f"writing {path} stopped ({reason}); it is incomplete and is not committed", errno=code)
    failure.__cause__ = error
    return failure
