"""One file on its way to the disk: its chunks, its first failure, and its steps: open, seal and write, sync, close.

Three threads meet here. The caller hands chunks over in order (`submit`). I/O threads seal and write them, one job per
chunk, which begins the next one's as soon as its own is sealed: seals come strictly in file order while writes overlap.
The loop's task (`_serve`) opens the file, and once all is written it syncs and closes it.

Guarantees:
- Every chunk is released exactly once, and only when no seal or write can touch its memory any more.
- The first failure stays, as an error of our tree with its cause; `FileWrite.done` always resolves. After a failure
  nothing new is begun, and the descriptor is closed only after all jobs have ended, cancelled tasks or not.
- Callers enter no lock while others need it: a signal handler that has interrupted one may wait for the disk.
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
from ..format.chunk import Chunk
from ..storage.write_file import WritableFile
from ..threads.executor import check_process
from ..threads.locks import Lock
from ..threads.outcome import Outcome
from .disk import Disk, bytes_to_write, in_our_tree, problem_with, whole_pages
from .jobs import Jobs


class FileWrite:
    """One file on its way to the disk, made by `WriterPool.open_file`. Its public methods: any thread, never block.

    Args:
        folder: where the directory is, once it is made, in which the file is called `name`.
        direct: past the page cache, where the file system allows it.
        depth: so many chunks of it at most are sealed and written at once.
    """

    def __init__(
        self,
        disk: Disk,
        folder: Future[str],
        name: str,
        size_bytes: int,
        seal: Callable[[int, memoryview], int],
        *,
        direct: bool,
        depth: int,
        make_parents: bool,
        tag: str,
    ) -> None:
        self.done: Outcome[FileWrite] = Outcome()
        """Resolves to the file itself, synced and closed."""
        self.settled: Outcome[None] = Outcome()
        """Resolves when no thread works on the file any more: after `done`, where the pool dies."""
        self.size_bytes = size_bytes
        self.extent_bytes = 0
        self.extent_crc32: list[int] = []
        """`extent_crc32[k]` covers bytes `[k * extent_bytes, (k + 1) * extent_bytes)`."""
        self._written_bytes = 0
        self.direct = False
        """Whether it went past the page cache."""
        self.durable_s = 0.0
        """When it was synced, on ``time.perf_counter``."""
        self._pid = os.getpid()
        self._disk = disk
        self._folder = folder
        self._name = name
        self._seal = seal
        self._wants_direct = direct
        self._depth = depth
        self._make_parents = make_parents
        self._lock = Lock()
        self._inbox: deque[Chunk] = deque()
        """Handed over by the caller, and not looked at yet."""
        self._held: dict[int, Chunk] = {}
        self._queue: deque[Chunk] = deque()
        self._next_offset = 0
        self._failure: BaseException | None = None
        self._is_over = False
        """The outcome is decided: no failure and no chunk is taken any more."""
        self._opened: WritableFile | None = None
        self._is_sealing = False
        self._one_write = Lock()
        """Held around writes through the cache."""
        self._num_chunk_jobs = 0
        self._jobs = Jobs(disk.io, disk.on_span, tag)
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
        # A single operation: interrupted, this has taken all of them or none.
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

    def expect_no_more(self) -> None:
        """Give the file up if it lacks chunks now."""
        self._disk.loop.call(self._refuse_more)

    @property
    def path(self) -> str:
        """Where the file is; "" while that is not known."""
        is_known = self._folder.done() and self._folder.exception() is None
        return os.path.join(self._folder.result(), self._name) if is_known else ""

    def waiting_for(self) -> str:
        """What the file waits for now, in words."""
        return self._jobs.waits_for(self._shown)

    @property
    def _shown(self) -> str:
        return repr(self.path) if self.path else "a file of a staging directory that is still being made"

    # The loop's thread and I/O threads.

    def _take_over(self) -> None:
        """Queue what was handed over, or release it where the file has failed or the chunk is wrong."""
        while self._inbox:
            with self._lock:
                if not self._inbox:
                    return
                chunk, problem = self._inbox[0], None
                is_late = self._failure is not None or self._is_over
                if not is_late:
                    problem = problem_with(chunk, self._next_offset, self.extent_bytes, self.size_bytes)
                if problem is None and not is_late:
                    self.extent_bytes = self.extent_bytes or chunk.nbytes
                    self._held[chunk.offset] = chunk
                    self._next_offset += chunk.nbytes
                    self._disk.count(+1)
                    self._queue.append(chunk)
                self._inbox.popleft()
            if problem is not None:
                what = f"chunk of {chunk.nbytes} bytes at offset {chunk.offset} of {self._shown}: {problem}"
                self._fail(TransactionStateError(what))
            if problem is not None or is_late:
                chunk.release()

    def _fail(self, error: BaseException, *, keep: bool = False) -> None:
        """Remember `error` if it is the first, as one of our tree unless `keep`."""
        with self._lock:
            if self._failure is None and not self._is_over:
                # What is no Exception (KeyboardInterrupt) would end every event loop that awaits it.
                self._failure = error if keep and isinstance(error, Exception) else in_our_tree(error, self._shown)
        self._notify()

    def _refuse_more(self) -> None:
        # It has not begun where the signal handler that closes the pool has interrupted `open_file`.
        self.start()
        self._take_over()
        if self._next_offset < self.size_bytes:
            self._fail(TransactionStateError(f"the pool was closed before all of {self._shown} was submitted"))

    def _notify(self) -> None:
        """Let the loop look at what has changed: there no interrupt cuts a beginning in two."""
        self._disk.loop.call(self._look)

    def _release(self, chunk: Chunk) -> None:
        """Give one chunk back, unless that was done; no thread may use it any more."""
        if self._held.pop(chunk.offset, None) is not None:
            self._disk.count(-1)
            chunk.release()

    def _release_all(self) -> None:
        self._take_over()
        self._queue.clear()
        for chunk in list(self._held.values()):
            self._release(chunk)

    def begin_next(self) -> None:
        """Begin to seal and write the next chunk, if its turn has come."""
        self._take_over()
        with self._lock:
            is_ready = self._opened is not None and self._failure is None and not self._is_sealing and bool(self._queue)
            if not is_ready or self._num_chunk_jobs >= self._depth or not self._disk.take_slot(self.begin_next):
                return
            chunk = self._queue.popleft()
            self._is_sealing = True
            self._num_chunk_jobs += 1
            # Counted before the lock is free: a file that ends meanwhile gives no chunk back that a job will touch.
            try:
                job = self._jobs.run(lambda: self._seal_and_write(chunk))
            except CheckpointError as error:
                job = Future()
                job.set_exception(error)
        job.add_done_callback(lambda ended: self._chunk_ended(chunk, ended.exception()))

    def _seal_and_write(self, chunk: Chunk) -> None:
        file = self._opened
        assert file is not None
        at, nbytes, view = chunk.offset, chunk.nbytes, chunk.buffer[: chunk.nbytes]
        self.extent_crc32.append(self._jobs.timed("crc", at, nbytes, lambda: self._seal(at, view)))
        with self._lock:
            self._is_sealing = False
        # The next seal goes on beside this write.
        self.begin_next()
        whole = bytes_to_write(chunk, file)
        with contextlib.nullcontext() if self._wants_direct else self._one_write:
            self._jobs.timed("write", at, nbytes, lambda: file.pwrite(whole, at))

    def _chunk_ended(self, chunk: Chunk, error: BaseException | None) -> None:
        with self._lock:
            self._num_chunk_jobs -= 1
            self._written_bytes += chunk.nbytes if error is None else 0
            is_written = self._written_bytes == self.size_bytes
        if error is not None:
            self._fail(error)
        else:
            self._release(chunk)
        self._disk.give_slot_back()
        if is_written:
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
        await self._until(lambda: bool(self._queue) or not self.size_bytes)
        jobs.step = "the directory"
        self._folder.add_done_callback(lambda _: self._notify())
        await self._until(self._folder.done)
        self._folder.result()
        path = jobs.path = self.path
        if self._make_parents:
            await asyncio.wrap_future(jobs.run(lambda: self._disk.make_parents(path)))
        jobs.step = "open"
        # Whole pages: a padded end that made the file grow would be written alone, under the inode's lock.
        reserved_bytes = whole_pages(self.size_bytes) if self._wants_direct else self.size_bytes
        opened = await self._disk.filesystem.open_write(path, reserved_bytes, direct=self._wants_direct, executor=jobs)
        self.direct, self._opened = opened.direct, opened
        jobs.step = "a chunk or a free writer"
        if self.size_bytes:
            self.begin_next()
            await self._until(lambda: self._written_bytes == self.size_bytes)
        if reserved_bytes > self.size_bytes:
            jobs.step = "truncate"
            await opened.truncate(self.size_bytes)
        jobs.step = "fsync"
        await opened.fsync()
        self.durable_s = time.perf_counter()
        jobs.step = "close"
        await opened.close()

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
            report(logging.INFO, "closing %s after %r: %r", self._shown, self._failure, late)
        return True
