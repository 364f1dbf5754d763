"""One file on its way to the disk: its chunks, its first failure, and its steps: open, seal and write, sync, close.

Three threads meet here. The caller hands chunks over in order (`submit`). I/O threads seal and write them, one job per
chunk, which begins the next one's as soon as its own is sealed: seals come strictly in file order while writes overlap.
The loop's task (`_serve`) opens the file, and once all is written it syncs and closes it.

Guarantees:
- The first failure stays, as an error of our tree with its cause; `FileWrite.done` always resolves. After a failure
  nothing new is begun; a chunk is released, and the descriptor closed, when no job can touch it any more.
- Callers enter no lock while others need it: a signal handler that has interrupted one may wait for the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future

from ..errors import CheckpointError, TransactionStateError, report
from ..format.chunk import Chunk
from ..format.shares import Share
from ..storage.read_file import Stamp
from ..storage.write_file import WritableFile
from ..threads.executor import check_process
from ..threads.locks import Lock
from ..threads.outcome import Outcome
from .disk import Disk, in_our_tree
from .jobs import Jobs
from .queue import ChunkQueue
from .sharing import HowToWrite, Sharing, open_new, open_older, share_or_write


class FileWrite:
    """One file on its way to the disk, made by `WriterPool.open_file`. Any thread; nothing blocks but `open_older`."""

    def __init__(
        self,
        disk: Disk,
        folder: Future[str],
        name: str,
        size_bytes: int,
        seal: Callable[[int, memoryview], int],
        how: HowToWrite,
    ) -> None:
        self.done: Outcome[FileWrite] = Outcome()
        """Resolves to the file itself, synced and closed."""
        self.settled: Outcome[None] = Outcome()
        """Resolves when no thread works on the file any more: after `done`, where the pool dies."""
        self.path = name
        """Where the file is; below its directory, until that is known."""
        self.size_bytes = size_bytes
        self.extent_bytes = 0
        self.extent_crc32: list[int] = []
        """`extent_crc32[k]` covers bytes `[k * extent_bytes, (k + 1) * extent_bytes)`, from the first one here on."""
        self._share = how.share or Share(0, size_bytes, size_bytes)
        self._num_bytes_left = self._share.copied_end - self._share.start
        self._writes_nothing = how.share is not None and how.share.start == how.share.end
        """Other processes write all of it."""
        self.sharing: Sharing | None = None
        """The older file, while this one may share its bytes."""
        self._find_older = how.older
        self.direct = False
        """Whether it went past the page cache."""
        self.durable_s = 0.0
        """When it was synced, on ``time.perf_counter``."""
        self.stamp: Stamp | None = None
        """Of its content, once that is known to be synced."""
        self._pid = os.getpid()
        self._disk = disk
        self._folder = folder
        self._name = name
        self._seal = seal
        self._how = how
        self._lock = Lock()
        self._queue = ChunkQueue(
            disk,
            (self._share.start, self._share.copied_end),
            self._lock,
            is_late=self._is_late,
            refuse=lambda why: self._fail(TransactionStateError(why.format(repr(self.path)))),
        )
        self._failure: BaseException | None = None
        self._is_over = False
        """The outcome is decided: no failure and no chunk is taken any more."""
        self._opened: WritableFile | None = None
        self._is_sealing = False
        self._one_buffered_write = Lock()
        self._num_chunk_jobs = 0
        self._jobs = Jobs(disk.io, disk.on_span, how.tag)
        self.seconds = self._jobs.seconds
        self._changed = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    # The caller's side.

    def submit(self, *chunks: Chunk) -> None:
        """Hand over the next chunks (ascending, without gaps, equal sizes except the last).

        They are taken over in every case, and released exactly once. One that is out of order or past the end fails the
        file. Raises TransactionStateError: in a forked child.
        """
        check_process(self._pid, "this file")
        self._queue.inbox.extend(chunks)
        self._notify()
        if self._is_over:
            self._queue.take_over()

    def has_taken(self, offset: int) -> bool:
        """Whether the chunk at `offset` was taken over, and so is released here."""
        return self._queue.has_taken(offset)

    def abort(self, error: BaseException) -> None:
        """Give the file up after its writes in flight: `done` fails with `error`, unless it has ended or failed."""
        check_process(self._pid, "this file")
        self._disk.loop.call(lambda: self._fail(error, keep=True))

    def open_older(self) -> Sharing | None:
        """Open the older file, unless that was done; None where nothing can be shared with it. Blocks on the disk."""
        find, self._find_older = self._find_older, None
        if find is not None:
            self.sharing = open_older(self._disk.filesystem, find())
        return self.sharing

    def waiting_for(self) -> str:
        """What the file waits for now, in words."""
        return self._jobs.waits_for(self.path)

    # The loop's thread and I/O threads.

    def _fail(self, error: BaseException, *, keep: bool = False) -> None:
        """Remember `error` if it is the first, as one of our tree unless `keep`."""
        with self._lock:
            if self._failure is None and not self._is_over:
                # What is no Exception (KeyboardInterrupt) would end every event loop that awaits it.
                self._failure = error if keep and isinstance(error, Exception) else in_our_tree(error, self.path)
        self._notify()

    def _is_late(self) -> bool:
        """Whether no chunk is taken any more."""
        return self._failure is not None or self._is_over

    def expect_no_more(self) -> None:
        """Give the file up if it lacks chunks now: begun, where a handler that closes has interrupted `open_file`."""
        self.start()
        self._queue.take_over()
        if self._queue.next_offset < self._queue.end:
            self._fail(TransactionStateError(f"the pool was closed before all of {self.path!r} was submitted"))

    def _notify(self) -> None:
        """Let the loop look at what has changed: there no interrupt cuts a beginning in two."""
        self._disk.loop.call(self._look)

    def _release_all(self) -> None:
        self._queue.release_all()  # First: memory that does not come back ends all saves.
        if self.sharing is not None:
            self.sharing.close()

    def begin_next(self) -> None:
        """Begin to seal and write the next chunk, if its turn has come."""
        self._queue.take_over()
        with self._lock:
            is_ready = self._failure is None and not self._is_sealing and bool(self._queue.waiting)
            is_ready &= self._opened is not None or self._queue.held_back is not None or self._writes_nothing
            if not is_ready or self._num_chunk_jobs >= self._how.depth or not self._disk.take_slot(self.begin_next):
                return
            chunk = self._queue.waiting.popleft()
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
        self.extent_bytes = self._queue.extent_bytes
        extent = (at - self._share.start) // max(1, self.extent_bytes)
        if extent == len(self.extent_crc32):
            seal = (chunk.is_elsewhere and self._how.pass_over) or self._seal
            self.extent_crc32.append(self._jobs.timed("crc", at, nbytes, lambda: seal(at, view)))
        crc, sharing = self.extent_crc32[extent], self.sharing
        is_equal = sharing is not None and sharing.is_equal(extent, crc)
        with self._lock:
            self._is_sealing = False
            if self._queue.held_back is not None:
                self._queue.hold_back(self._queue.held_back, chunk, more=is_equal)
                return False
        # The next seal goes on beside this write.
        self.begin_next()
        if at < self._share.end:
            file = self._opened
            assert file is not None
            with contextlib.nullcontext() if self._how.direct else self._one_buffered_write:
                share_or_write(chunk, file, self._jobs, sharing if is_equal else None, crc)
        return True

    def _chunk_ended(self, chunk: Chunk, ended: Future[bool]) -> None:
        error = ended.exception()
        is_done = error is None and ended.result()
        if error is not None:
            self._fail(error)
        elif is_done:
            self._queue.release(chunk)
        with self._lock:
            self._num_chunk_jobs -= 1
            self._num_bytes_left -= chunk.nbytes if is_done else 0
            is_all = not self._num_bytes_left
        self._disk.give_slot_back()
        if is_all or not is_done:
            self._notify()
        else:
            self.begin_next()

    # The loop's thread.

    def start(self) -> None:
        """Begin to wait for chunks, if need be."""
        if self._serving is None:
            self._serving = asyncio.get_running_loop().create_task(self._serve())
            self._serving.add_done_callback(self._ensure_told)

    def die(self, error: BaseException) -> None:
        """The pool is dead: tell the outcome now, clean up as far as that still works."""
        self._fail(error)
        with self._lock:
            self._is_over = True
        self._look()
        self.done.resolve(None, self._failure or error)

    def abandon(self) -> None:
        """No task will run any more: give memory back once no thread uses it. The descriptor is left to its owner."""
        self._jobs.on_idle(self._release_all)

    def _look(self) -> None:
        self._changed.set()
        self.begin_next()

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Wait for a state of the file. Raises its first failure."""
        while self._failure is None and not is_so():
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    async def _serve(self) -> None:
        try:
            await self._put_on_disk()
        except BaseException as error:  # noqa: BLE001 -- becomes the file's outcome
            self._fail(error)
        with self._lock:
            self._is_over = True
        while self._failure is not None and not await self._has_settled():
            pass
        self._end(self._failure)

    def _end(self, failure: BaseException | None) -> None:
        self._release_all()
        self.settled.resolve(None, None)
        self.done.resolve(self, failure)

    def _ensure_told(self, task: asyncio.Task[None]) -> None:
        """`done` resolves also when the task was cancelled before its first step, or its clean-up itself broke."""
        if self.done.done():
            return
        if task.cancelled():
            self._fail(asyncio.CancelledError())
            self._serving = None
            self.start()
        else:
            broken = task.exception() or RuntimeError("the file's task ended without an outcome")
            self._fail(broken)
            self.abandon()
            self._end(self._failure or broken)

    async def _put_on_disk(self) -> None:
        jobs = self._jobs
        jobs.step = "the first chunk"
        # Not before: to reserve the file's blocks takes milliseconds of a core, while the caller copies on all of them.
        await self._until(lambda: bool(self._queue.extent_bytes) or not self.size_bytes)
        jobs.step = "the directory"
        self._folder.add_done_callback(lambda _: self._notify())
        await self._until(self._folder.done)
        path = self.path = jobs.path = os.path.join(self._folder.result(), self._name)
        if self._how.make_parents:
            await asyncio.wrap_future(jobs.run(lambda: self._disk.make_parents(path)))
        if self._find_older is not None:
            jobs.step = "the older file"
            await asyncio.wrap_future(jobs.run(self.open_older))
        sharing, is_whole = self.sharing, not self._queue.is_scarce
        if sharing is not None and sharing.by_link and is_whole and await self._becomes_link(path, sharing):
            return
        if not self._writes_nothing:
            self._opened = await open_new(self._disk.filesystem, path, self.size_bytes, self._how, jobs, sharing)
            self.direct = self._opened.direct
        jobs.step = "a chunk or a free writer"
        if self.size_bytes:
            self.begin_next()
            await self._until(lambda: not self._num_bytes_left)
        opened, self.durable_s = self._opened, time.perf_counter()
        if opened is None:
            return
        if opened.size_bytes > self.size_bytes and self._how.share is None:
            jobs.step = "truncate"
            await opened.truncate(self.size_bytes)
        jobs.step = "fsync"
        await opened.fsync()
        self.stamp, self.durable_s = opened.stamp, time.perf_counter()
        jobs.step = "close"
        await opened.close()

    async def _becomes_link(self, path: str, sharing: Sharing) -> bool:
        """Whether this file is another name of the older one now, and so is durable."""
        jobs, queue = self._jobs, self._queue
        jobs.step = "a chunk that is not equal"
        queue.held_back = []
        self.begin_next()
        await self._until(lambda: queue.num_bytes_held_back in (None, self.size_bytes))
        if queue.held_back is not None and await asyncio.wrap_future(jobs.run(lambda: sharing.link(path))):
            self.stamp, self.durable_s = sharing.stamp, time.perf_counter()
            return True
        with self._lock:
            queue.put_back()
        return False

    async def _has_settled(self) -> bool:
        """One round of waiting, after a failure, for idle jobs and a closed file; False when there is more of it."""
        try:
            self._changed.clear()
            if not self._jobs.is_idle:
                self._jobs.step = "the end of what is in flight"
                self._jobs.on_idle(self._notify)
                await self._changed.wait()
                return False
            self._jobs.step = "close"
            if self._opened is not None:
                await self._opened.close()
        except asyncio.CancelledError:
            return False
        except (CheckpointError, OSError, RuntimeError) as late:
            report(logging.INFO, "closing %r after %r: %r", self.path, self._failure, late)
        return True
