"""The chunks of one file, from the moment they are handed over until they are released, each exactly once.

The caller hands them over in order (`submit`). I/O threads seal and write them, one job per chunk, which begins the
next one's as soon as its own is sealed: seals come strictly in file order while writes overlap.

Guarantees:
- The first failure stays, as an error of our tree with its cause. After it nothing new is begun; a chunk is released
  when no job can touch it any more.
- Callers enter no lock while others need it: a signal handler that has interrupted one may wait for the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

from ..errors import CheckpointError, TransactionStateError, WriteError
from ..format.chunk import Chunk
from ..format.shares import Share
from ..storage.write_error import FULL, MOMENTARY
from ..storage.write_file import WritableFile
from ..threads.executor import check_process
from ..threads.locks import Lock
from .disk import Disk, Jobs, whole_pages
from .sharing import FindOlder, Sharing


@dataclass(frozen=True)
class HowToWrite:
    """How one file is written; as `WriterPool.open_file` takes it."""

    direct: bool
    """Past the page cache, where the file system allows it."""
    depth: int
    """So many chunks of it at most are sealed and written at once."""
    rewrites: bool
    """Once more where its disk has failed for a moment: until it is synced, its chunks are kept."""
    tag: str
    older: FindOlder | None
    pass_over: Callable[[int, memoryview], int] | None
    share: Share | None


class FileChunks:
    """The chunks of `FileWrite`, which has the loop's side. Any thread."""

    def __init__(
        self, disk: Disk, name: str, size_bytes: int, seal: Callable[[int, memoryview], int], how: HowToWrite
    ) -> None:
        self.path = name
        """Where the file is; below its directory, until that is known."""
        self.size_bytes = size_bytes
        self.extent_bytes = 0
        self.extent_crc32: list[int] = []
        """`extent_crc32[k]` covers bytes `[k * extent_bytes, (k + 1) * extent_bytes)`, from the first one here on."""
        self.sharing: Sharing | None = None
        """The older file, while this one may share its bytes."""
        self._pid = os.getpid()
        self._disk = disk
        self._seal = seal
        self._how = how
        self._share = how.share or Share(0, size_bytes, size_bytes)
        self._next_offset = self._share.start
        self._num_bytes_left = self._share.copied_end - self._share.start
        self._writes_nothing = how.share is not None and how.share.start == how.share.end
        """Other processes write all of it."""
        self._is_scarce = False
        """Whether later chunks wait for the memory of these."""
        self._lock = Lock()
        self._failure: BaseException | None = None
        self._first: WriteError | None = None
        """The failure after which the file is to be written once more."""
        self._may_rewrite = how.rewrites
        self._is_over = False
        """The outcome is decided: no failure and no chunk is taken any more."""
        self._inbox: deque[Chunk] = deque()
        """Handed over by the caller, in a single operation (interrupted, this has all of the chunks or none), and not
        looked at yet."""
        self._held: dict[int, Chunk] = {}
        self._keeps = how.rewrites
        """Whether what is released is kept, so that it can be taken back."""
        self._kept: dict[int, Chunk] = {}
        self._waiting: deque[Chunk] = deque()
        """To be written. With the lock."""
        self._held_back: list[Chunk] | None = None
        """Sealed and not written: while each is equal to the older file's, the file may become a link to that."""
        self._opened: WritableFile | None = None
        self._is_ready = self._writes_nothing
        """Whether chunks may be sealed, and held back or written then."""
        self._is_sealing = False
        self._one_buffered_write = Lock()
        self._num_chunk_jobs = 0
        self._jobs = Jobs(disk, name, how.tag)
        self.seconds = self._jobs.seconds
        self._changed = asyncio.Event()

    # The caller's side.

    def submit(self, *chunks: Chunk) -> None:
        """Hand over the next chunks (ascending, without gaps, equal sizes except the last).

        They are taken over in every case, and released exactly once. One that is out of order or past the end fails the
        file. Raises TransactionStateError: in a forked child.
        """
        check_process(self._pid, "this file")
        self._inbox.extend(chunks)
        self._notify()
        if self._is_over:
            self._take_over()

    def has_taken(self, offset: int) -> bool:
        """Whether the chunk at `offset` was taken over, and so is released here."""
        # In this order: it is counted before it leaves the inbox.
        return any(chunk.offset == offset for chunk in list(self._inbox)) or offset < self._next_offset

    def abort(self, error: BaseException) -> None:
        """Give the file up after its writes in flight: `done` fails with `error`, unless it has ended or failed."""
        check_process(self._pid, "this file")
        self._disk.loop.call(lambda: self._fail(error, keep=True))

    def let_go(self) -> bool:
        """Give back what is only kept for a second try, and keep no more; False where nothing is kept. Never blocks,
        and no lock: whom a signal handler interrupts here may have it."""
        did_keep, self._keeps = self._keeps, False
        for chunk in self._take_kept():
            chunk.release()
        return did_keep

    # Any thread but a user's.

    def _notify(self) -> None:
        """Let the loop look at what has changed: there no interrupt cuts a beginning in two."""
        self._disk.loop.call(self._look)

    def _look(self) -> None:
        self._changed.set()
        self.begin_next()

    def _fail(self, error: BaseException, *, keep: bool = False) -> None:
        """Remember `error` if it is the first, as one of our tree unless `keep`: then the file was given up."""
        with self._lock:
            if keep or self._is_over:
                self._first = None
            elif self._failure is None and self._may_rewrite and isinstance(error, WriteError):
                self._first = error if error.errno in MOMENTARY | FULL else None
            elif not isinstance(error, (WriteError, asyncio.CancelledError)):
                # Not the disk's: a chunk whose seal has failed cannot be sealed again.
                self._first = None
            if self._failure is None and not self._is_over:
                # What is no Exception (KeyboardInterrupt) would end every event loop that awaits it.
                self._failure = error if keep and isinstance(error, Exception) else _in_our_tree(error, self.path)
        self._notify()

    def _take_over(self) -> None:
        """Queue what was handed over, or release it where the file has failed or the chunk is wrong."""
        while self._inbox:
            with self._lock:
                if not self._inbox:
                    return
                chunk = self._inbox[0]
                is_late = self._is_over or (self._failure is not None and self._first is None)
                problem = None if is_late else self._problem_with(chunk)
                is_taken = not is_late and problem is None
                if is_taken:
                    self.extent_bytes = self.extent_bytes or chunk.nbytes
                    self._held[chunk.offset] = chunk
                    self._next_offset += chunk.nbytes
                    self._disk.count(+1)
                    self._waiting.append(chunk)
                    self._is_scarce |= chunk.is_scarce
                self._inbox.popleft()
            if problem is not None:
                where = f"chunk of {chunk.nbytes} bytes at offset {chunk.offset} of {self.path!r}"
                self._fail(TransactionStateError(f"{where}: {problem}"))
            if not is_taken:
                chunk.release()

    def _problem_with(self, chunk: Chunk) -> str | None:
        """Why it is not the next one."""
        if chunk.offset != self._next_offset:
            return f"out of order, the next offset is {self._next_offset}"
        end, size_bytes, extent_bytes = chunk.offset + chunk.nbytes, self._share.copied_end, self.extent_bytes
        if end > size_bytes or (chunk.nbytes == 0 and size_bytes > 0):
            return f"the file has {size_bytes} bytes"
        if extent_bytes and chunk.nbytes != extent_bytes and (end != size_bytes or chunk.nbytes > extent_bytes):
            return f"all chunks but the last must have {extent_bytes} bytes"
        if chunk.buffer.nbytes < chunk.nbytes:
            return f"its buffer has only {chunk.buffer.nbytes} bytes"
        return None

    def begin_next(self) -> None:
        """Begin to seal and write the next chunk, if its turn has come."""
        self._take_over()
        with self._lock:
            is_ready = self._is_ready and self._failure is None and not self._is_sealing and bool(self._waiting)
            if not is_ready or self._num_chunk_jobs >= self._how.depth or not self._disk.take_slot(self.begin_next):
                return
            chunk = self._waiting.popleft()
            self._is_sealing = True
            self._num_chunk_jobs += 1
            # Counted before the lock is free: a file that ends meanwhile gives no chunk back that a job will touch.
            try:
                job = self._jobs.run(lambda: self._seal_and_write(chunk))
            except CheckpointError as error:
                job = Future()
                job.set_exception(error)
        job.add_done_callback(lambda ended: self._chunk_ended(chunk, ended))

    def _seal_and_write(self, chunk: Chunk) -> bool:
        """False where the chunk is held back: it may come again, sealed."""
        at, nbytes, view = chunk.offset, chunk.nbytes, chunk.buffer[: chunk.nbytes]
        extent = (at - self._share.start) // max(1, self.extent_bytes)
        if extent == len(self.extent_crc32):
            seal = (chunk.is_elsewhere and self._how.pass_over) or self._seal
            self.extent_crc32.append(self._jobs.timed("crc", at, nbytes, lambda: seal(at, view)))
        crc, sharing = self.extent_crc32[extent], self.sharing
        is_equal = sharing is not None and sharing.is_equal(extent, crc)
        with self._lock:
            self._is_sealing = False
            if self._held_back is not None:
                self._held_back.append(chunk)
                if not is_equal:
                    self._put_back()
                return False
        # The next seal goes on beside this write.
        self.begin_next()
        if at < self._share.end:
            with contextlib.nullcontext() if self._how.direct else self._one_buffered_write:
                self._share_or_write(chunk, crc, sharing if is_equal else None)
        return True

    def _share_or_write(self, chunk: Chunk, crc: int, sharing: Sharing | None) -> None:
        """Put a sealed chunk into its place. `sharing`: where it is equal to the older file's."""
        at, nbytes, shared, file = chunk.offset, chunk.nbytes, 0, self._opened
        assert file is not None
        if sharing is not None:
            shared = self._jobs.timed("share", at, nbytes, lambda: sharing.share(file, at, nbytes))
        if shared < nbytes or not nbytes:
            if chunk.is_elsewhere and sharing is not None:
                sharing.read(chunk, crc)
            rest = _bytes_to_write(chunk, file)[shared:]
            self._jobs.timed("write", at + shared, nbytes - shared, lambda: file.pwrite(rest, at + shared))

    def _chunk_ended(self, chunk: Chunk, ended: Future[bool]) -> None:
        error = ended.exception()
        is_done = error is None and ended.result()
        if error is not None:
            self._fail(error)
        elif is_done:
            self._release(chunk)
        with self._lock:
            self._num_chunk_jobs -= 1
            self._num_bytes_left -= chunk.nbytes if is_done else 0
            is_all = not self._num_bytes_left
        self._disk.give_slot_back()
        # Who waits after a failure waits for those that succeed too.
        if is_all or not is_done or self._failure is not None:
            self._notify()
        else:
            self.begin_next()

    def _put_back(self) -> None:
        """Put what was held back in front of the others. With the lock."""
        held, self._held_back, self._is_ready = self._held_back or [], None, False
        self._waiting.extendleft(reversed(held))

    # Giving back.

    def _release(self, chunk: Chunk) -> None:
        """Give one chunk back, unless that was done, or keep it; no thread may use it any more."""
        if self._held.pop(chunk.offset, None) is None:
            return
        self._disk.count(-1)
        if self._keeps:
            self._kept[chunk.offset] = chunk
        # Also where `let_go` has come in between, and has not seen it.
        if not self._keeps and self._kept.pop(chunk.offset, chunk) is chunk:
            chunk.release()

    def _take_kept(self) -> Iterator[Chunk]:
        with contextlib.suppress(KeyError):
            while True:
                yield self._kept.popitem()[1]

    def _take_back(self) -> bool:
        """Queue all chunks again, from the first one on, and keep none any more; False where some are gone. With the
        lock."""
        self._keeps = False
        kept = {chunk.offset: chunk for chunk in self._take_kept()}
        self._disk.count(len(kept))
        self._held.update(kept)
        self._held_back, self._is_ready = None, False
        self._waiting = deque(self._held[offset] for offset in sorted(self._held))
        return sum(chunk.nbytes for chunk in self._waiting) == self._next_offset

    def _release_all(self) -> None:
        """Give all of them back; no thread may use them any more, and no other will come."""
        # First: memory that does not come back ends all saves.
        if self._keeps:
            self.let_go()
        self._take_over()
        self._waiting.clear()
        for chunk in list(self._held.values()):
            self._release(chunk)
        if self.sharing is not None:
            self.sharing.close()


def _in_our_tree(error: BaseException, path: str) -> BaseException:
    """`error`, which ended the writing of `path`, as one of our tree."""
    if isinstance(error, CheckpointError):
        return error
    reason = "a writer task was cancelled" if isinstance(error, asyncio.CancelledError) else repr(error)
    code = error.errno if isinstance(error, OSError) else None
    failure = WriteError(f"writing {path!r} stopped ({reason}); it is incomplete and is not committed", errno=code)
    failure.__cause__ = error
    return failure


def _bytes_to_write(chunk: Chunk, file: WritableFile) -> memoryview:
    """The chunk's bytes, in whole pages where the file wants them: one write, and the truncation cuts the rest."""
    end = whole_pages(chunk.nbytes)
    if not file.direct or end == chunk.nbytes or chunk.buffer.nbytes < end:
        return chunk.buffer[: chunk.nbytes]
    chunk.buffer[chunk.nbytes : end] = bytes(end - chunk.nbytes)
    return chunk.buffer[:end]
