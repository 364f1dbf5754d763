"""One file on its way to the disk: its chunks, its first failure, and its steps: open, seal and write, sync, close.

Three threads meet here. The caller hands chunks over in order (`submit`). I/O threads seal and write them, one job per
chunk: each begins the next one's job as soon as its own chunk is sealed, so that seals come strictly in file order
while writes overlap. The loop's task (`_serve`) opens the file, and once all is written it syncs and closes it.

Guarantees:
- Every chunk is released exactly once, and only when no seal or write can touch its memory any more.
- The first failure stays, as an error of our tree with its cause; `FileWrite.done` always resolves. After a failure
  nothing new is begun, and the descriptor is closed only after all jobs have ended, cancelled tasks or not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from ..errors import CheckpointError, TransactionStateError, report
from ..storage.write_file import WritableFile
from ..threads.executor import check_process
from ..threads.locks import Lock
from ..threads.outcome import Outcome
from .chunks import PAGE_BYTES, Chunk, WrittenFile, bytes_to_write, problem_with, whole_pages
from .disk import Disk, in_our_tree
from .io_mode import IoMode
from .jobs import Jobs


class FileWrite:
    """One file on its way to the disk, made by `WriterPool.open_file`. Its public methods: any thread, never block."""

    def __init__(
        self,
        disk: Disk,
        location: str | Future[str],
        size_bytes: int,
        seal: Callable[[int, memoryview], int],
        *,
        mode: IoMode,
        make_parents: bool,
        tag: str,
    ) -> None:
        self.done: Outcome[WrittenFile] = Outcome()
        self.settled: Outcome[None] = Outcome()
        """Resolves when no thread works on the file any more: after `done`, where the pool dies."""
        self.location = location
        self.size_bytes = size_bytes
        self.extent_bytes = 0
        self.written_bytes = 0
        self._pid = os.getpid()
        self._disk = disk
        self._seal = seal
        self._mode = mode
        self._make_parents = make_parents
        self._lock = Lock()
        self._held: dict[int, Chunk] = {}
        self._queue: deque[Chunk] = deque()
        self._next_offset = 0
        self._failure: BaseException | None = None
        self._is_over = False
        """The outcome is decided: no failure and no chunk is taken any more."""
        self._opened: WritableFile | None = None
        self._crcs: list[int] = []
        self._is_sealing = False
        self._one_write = Lock()
        """Held around writes through the cache."""
        self._num_chunk_jobs = 0
        self._jobs = Jobs(disk.io, disk.on_span, tag)
        self._changed = asyncio.Event()
        self._serving: asyncio.Task[None] | None = None

    # The caller's side.

    def submit(self, *chunks: Chunk) -> None:
        """Hand over the next chunks (ascending, without gaps, equal sizes except the last).

        They are taken over in every case, and released exactly once, by a file that has failed too.

        Raises:
            TransactionStateError: out of order or past the end (this fails the file), or in a forked child.
        """
        check_process(self._pid, "this file")
        problems = [self._take_over(chunk) for chunk in chunks]
        # Once for all of them: to wake the loop costs more than to queue a chunk.
        self._notify()
        for chunk, problem in zip(chunks, problems, strict=True):
            if problem is not None:
                error = TransactionStateError(
                    f"chunk of {chunk.nbytes} bytes at offset {chunk.offset} of {self.path}: {problem}"
                )
                self.abort(error)
                raise error

    def has_taken(self, offset: int) -> bool:
        """Whether the chunk at `offset` was taken over: then it is released here, now or later."""
        with self._lock:
            return offset in self._held or offset < self._next_offset

    def abort(self, error: BaseException) -> None:
        """Give the file up after its writes in flight: `done` fails with `error`, unless it has ended or failed."""
        check_process(self._pid, "this file")
        if not self._fail(error, keep=True):
            # Whoever failed it first may have been interrupted before the loop was told.
            self._notify()

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
    def lacks_chunks(self) -> bool:
        """Whether the caller has not submitted all of it yet."""
        return self._next_offset < self.size_bytes

    def waiting_for(self) -> str:
        """What it waits for now, in words."""
        return self._jobs.waits_for(self.path)

    def _take_over(self, chunk: Chunk) -> str | None:
        """Queue it, or release it: what is wrong with it, or None."""
        with self._lock:
            is_late = self._failure is not None or self._is_over
            problem = None if is_late else problem_with(chunk, self._next_offset, self.extent_bytes, self.size_bytes)
            is_taken = problem is None and not is_late
            if is_taken:
                self.extent_bytes = self.extent_bytes or chunk.nbytes
                # First of all: from here on it is given back with the others, whatever interrupts this thread.
                self._held[chunk.offset] = chunk
                self._next_offset += chunk.nbytes
                self._disk.count(+1)
                self._queue.append(chunk)
        if not is_taken:
            chunk.release()
        return problem

    def _fail(self, error: BaseException, *, keep: bool = False) -> bool:
        """Remember `error` if it is the first, as one of our tree unless `keep`; says whether it was."""
        with self._lock:
            if self._failure is not None or self._is_over:
                return False
            # What is no Exception (KeyboardInterrupt) would end every event loop that awaits it.
            self._failure = error if keep and isinstance(error, Exception) else in_our_tree(error, self.path)
        self._notify()
        return True

    def _notify(self) -> None:
        """Let the loop look at what has changed. On the loop, because only there no interrupt can cut a beginning in
        two.
        """
        self._disk.loop.call(self._look)

    def _release(self, offset: int) -> None:
        """Give one chunk back; no thread may use it any more."""
        with self._lock:
            chunk = self._held.pop(offset, None)
        if chunk is not None:
            self._disk.count(-1)
            chunk.release()

    def _release_all(self) -> None:
        with self._lock:
            self._queue.clear()
            offsets = list(self._held)
        for offset in offsets:
            self._release(offset)

    # Jobs on I/O threads.

    def begin_next(self) -> None:
        """Begin to seal and write the next chunk, if its turn has come. The loop's thread or an I/O thread."""
        with self._lock:
            is_ready = self._opened is not None and self._failure is None and not self._is_sealing and bool(self._queue)
            if not is_ready or self._num_chunk_jobs >= self._mode.depth or not self._disk.take_slot(self.begin_next):
                return
            chunk = self._queue.popleft()
            self._is_sealing = True
            self._num_chunk_jobs += 1
        try:
            job = self._jobs.run(lambda: self._seal_and_write(chunk))
        except CheckpointError as error:
            self._chunk_ended(chunk, error)
        else:
            job.add_done_callback(lambda ended: self._chunk_ended(chunk, ended.exception()))

    def _seal_and_write(self, chunk: Chunk) -> None:
        file = self._opened
        assert file is not None
        view = chunk.buffer[: chunk.nbytes]
        self._crcs.append(self._jobs.timed("crc", chunk.offset, chunk.nbytes, lambda: self._seal(chunk.offset, view)))
        with self._lock:
            self._is_sealing = False
        # The next seal goes on beside this write.
        self.begin_next()
        whole = bytes_to_write(chunk, file)
        with contextlib.nullcontext() if self._mode.direct else self._one_write:
            self._jobs.timed("write", chunk.offset, chunk.nbytes, lambda: file.pwrite(whole, chunk.offset))

    def _chunk_ended(self, chunk: Chunk, error: BaseException | None) -> None:
        with self._lock:
            self._num_chunk_jobs -= 1
            self.written_bytes += chunk.nbytes if error is None else 0
            is_written = self.written_bytes == self.size_bytes
        if error is not None:
            self._fail(error)
        else:
            self._release(chunk.offset)
        self._disk.give_slot_back()
        if is_written:
            self._notify()
        else:
            self.begin_next()

    # The loop's thread.

    def start(self) -> None:
        """Begin to wait for chunks."""
        self._serving = asyncio.get_running_loop().create_task(self._serve())
        self._serving.add_done_callback(self._ensure_told)

    def die(self, error: BaseException) -> None:
        """The pool is dead: tell the outcome now, clean up as far as that still works."""
        self._fail(error)
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
        while True:
            if self._failure is not None:
                raise self._failure
            if is_so():
                return
            self._changed.clear()
            await self._changed.wait()

    async def _serve(self) -> None:
        written: WrittenFile | None = None
        try:
            written = await self._put_on_disk()
        except BaseException as error:  # noqa: BLE001 -- becomes the file's outcome
            self._fail(error)
        with self._lock:
            self._is_over = True
        if self._failure is not None:
            while not await self._has_settled():
                pass
        self._end(written, self._failure)

    def _end(self, written: WrittenFile | None, failure: BaseException | None) -> None:
        self._release_all()
        self.settled.resolve(None, None)
        self.done.resolve(written, failure)

    def _ensure_told(self, task: asyncio.Task[None]) -> None:
        """`done` resolves also when the task was cancelled before its first step, or its clean-up itself broke."""
        if self.done.done():
            return
        if task.cancelled():
            self._fail(asyncio.CancelledError())
            self.start()
        else:
            broken = task.exception() or RuntimeError("the file's task ended without an outcome")
            self._fail(broken)
            self.abandon()
            self._end(None, self._failure or broken)

    async def _put_on_disk(self) -> WrittenFile:
        self._jobs.step = "the first chunk"
        # Not before: to reserve the file's blocks takes milliseconds of a core, while the caller copies on all of them.
        await self._until(lambda: bool(self._queue) or not self.size_bytes)
        path = self._jobs.path = await self._find_location()
        if self._make_parents:
            await asyncio.wrap_future(self._jobs.run(lambda: self._disk.make_parents(path)))
        self._jobs.step = "open"
        # Whole pages: a padded end that made the file grow would be written alone, under the inode's lock.
        reserved_bytes = whole_pages(self.size_bytes) if self._mode.direct else self.size_bytes
        opened = await self._disk.filesystem.open_write(
            path, reserved_bytes, direct=self._mode.direct, executor=self._jobs
        )
        self._opened = opened
        self._jobs.step = "a chunk or a free writer"
        if self.size_bytes:
            self.begin_next()
            await self._until(lambda: self.written_bytes == self.size_bytes)
        if self._mode.direct and self.size_bytes % PAGE_BYTES:
            self._jobs.step = "truncate"
            await opened.truncate(self.size_bytes)
        self._jobs.step = "fsync"
        await opened.fsync()
        durable_s = time.perf_counter()
        self._jobs.step = "close"
        await opened.close()
        return WrittenFile(
            path=path,
            size_bytes=self.size_bytes,
            extent_bytes=self.extent_bytes,
            extent_crc32=tuple(self._crcs),
            direct=opened.direct,
            crc_s=self._jobs.seconds.get("crc", 0.0),
            write_s=self._jobs.seconds.get("write", 0.0),
            sync_s=self._jobs.seconds.get("fsync", 0.0),
            durable_s=durable_s,
        )

    async def _find_location(self) -> str:
        location = self.location
        if isinstance(location, str):
            return location
        self._jobs.step = "the directory"
        location.add_done_callback(lambda _: self._notify())
        await self._until(location.done)
        return location.result()

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
            report(logging.INFO, "closing %s after %r: %r", self.path, self._failure, late)
        return True
