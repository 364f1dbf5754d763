"""One file on its way to the disk: its chunks, its first failure, and its steps: open, seal and write, sync, close.

The loop's task (`_serve`) opens the file, and once all is written it syncs and closes it. Where its disk has failed for
a moment, a file that is kept in staging memory is written once more.

Guarantees:
- `FileWrite.done` always resolves. The descriptor is closed when no job can touch it any more, also where the task was
  cancelled: a reused number would send a late write into somebody else's file.
- Never twice on the same descriptor: after a failed write or fsync the kernel may have dropped pages, and call the next
  one good. The old file is deleted, and a new one written as a whole.
- Written chunks are kept until the file is synced, but no save waits for their memory: it is given back where that is
  wanted, and the first failure stands then. So it does where a file is larger than the free staging memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import CheckpointError, TransactionStateError, WriteError, report
from ..storage.read_file import Stamp
from ..storage.write_error import FULL, as_write_error
from ..threads.outcome import Outcome
from .chunks import FileChunks, HowToWrite
from .disk import Disk, whole_pages
from .sharing import Sharing, open_older

T = TypeVar("T")


class FileWrite(FileChunks):
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
        super().__init__(disk, name, size_bytes, seal, how)
        self.done: Outcome[FileWrite] = Outcome()
        """Resolves to the file itself, synced and closed."""
        self.settled: Outcome[None] = Outcome()
        """Resolves when no thread works on the file any more: after `done`, where the pool dies."""
        self.direct = False
        """Whether it went past the page cache."""
        self.durable_s = 0.0
        """When it was synced, on ``time.perf_counter``."""
        self.stamp: Stamp | None = None
        """Of its content, once that is known to be synced."""
        self._folder = folder
        self._name = name
        self._find_older = how.older
        self._serving: asyncio.Task[None] | None = None

    def open_older(self) -> Sharing | None:
        """Open the older file, unless that was done; None where nothing can be shared with it. Blocks on the disk."""
        find, self._find_older = self._find_older, None
        if find is not None:
            self.sharing = open_older(self._disk.filesystem, find())
        return self.sharing

    def waiting_for(self) -> str:
        """What the file waits for now, in words."""
        return self._jobs.waits_for()

    # The loop's thread, from here on.

    def start(self) -> None:
        """Begin to wait for chunks, if need be."""
        if self._serving is None:
            self._serving = asyncio.get_running_loop().create_task(self._serve())
            self._serving.add_done_callback(self._ensure_told)

    def expect_no_more(self) -> None:
        """Give the file up if it lacks chunks now: begun, where a handler that closes has interrupted `open_file`."""
        self.start()
        self._take_over()
        if self._next_offset < self._share.copied_end:
            self._fail(TransactionStateError(f"the pool was closed before all of {self.path!r} was submitted"))

    def die(self, error: BaseException) -> None:
        """The pool is dead: tell the outcome now, clean up as far as that still works."""
        self._may_rewrite = False
        self._fail(error)
        with self._lock:
            self._is_over = True
        self._look()
        self.done.resolve(None, self._failure or error)

    def abandon(self) -> None:
        """No task will run any more: give memory back once no thread uses it. The descriptor is left to its owner."""
        self._jobs.on_idle(self._release_all)

    async def _until(self, step: str, is_so: Callable[[], bool]) -> None:
        """Wait for a state of the file, which is told as `step`. Raises its first failure."""
        self._jobs.step = step
        while self._failure is None and not is_so():
            self._changed.clear()
            await self._changed.wait()
        if self._failure is not None:
            raise self._failure

    async def _do(self, step: str, fn: Callable[[], T], *, is_timed: bool = False) -> T:
        """Have an I/O thread do it, and wait for that, which is told as `step`."""
        self._jobs.step = step
        return await asyncio.wrap_future(self._jobs.submit(fn) if is_timed else self._jobs.run(fn))

    async def _serve(self) -> None:
        try:
            await self._put_on_disk()
        except BaseException as error:  # noqa: BLE001 -- becomes the file's outcome
            self._fail(error)
        try:
            if self._first is not None:
                await self._write_once_more(self._first)
        except BaseException as error:  # noqa: BLE001 -- as above
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
        # Not before: to reserve the file's blocks takes milliseconds of a core, while the caller copies on all of them.
        await self._until("the first chunk", lambda: bool(self.extent_bytes) or not self.size_bytes)
        self._folder.add_done_callback(lambda _: self._notify())
        await self._until("the directory", self._folder.done)
        path = self.path = self._jobs.path = os.path.join(self._folder.result(), self._name)
        if "/" in self._name:
            await self._do("the directory", lambda: self._make_parents(os.path.dirname(path)))
        if self._find_older is not None:
            await self._do("the older file", self.open_older)
        sharing = self.sharing
        if sharing is not None and sharing.by_link and not self._is_scarce and await self._becomes_link(path, sharing):
            return
        if not self._writes_nothing:
            await self._open_new(path, sharing)
        if self.size_bytes:
            self.begin_next()
            await self._until("a chunk or a free writer", lambda: not self._num_bytes_left)
        opened, self.durable_s = self._opened, time.perf_counter()
        if opened is None:
            return
        if opened.size_bytes > self.size_bytes and self._how.share is None:
            await self._do("truncate", lambda: opened.truncate(self.size_bytes), is_timed=True)
        await self._do("fsync", opened.fsync, is_timed=True)
        self.stamp, self.durable_s = opened.stamp, time.perf_counter()
        self._jobs.step = "close"
        await opened.close()

    def _make_parents(self, folder: str) -> None:
        what = "the directory of a file cannot be made in the staging directory; the file is not committed"
        with as_write_error(self._disk.filesystem, what, folder):
            self._disk.filesystem.makedirs(folder)

    async def _becomes_link(self, path: str, sharing: Sharing) -> bool:
        """Whether this file is another name of the older one now, and so is durable."""
        self._held_back, self._is_ready = [], True
        self.begin_next()
        await self._until(
            "a chunk that is not equal",
            lambda: (held := self._held_back) is None or sum(chunk.nbytes for chunk in held) == self.size_bytes,
        )
        if self._held_back is not None and await self._do("the link", lambda: sharing.link(path)):
            self.stamp, self.durable_s = sharing.stamp, time.perf_counter()
            return True
        with self._lock:
            self._put_back()
        return False

    async def _open_new(self, path: str, sharing: Sharing | None) -> None:
        """Make the file, or open it where other processes may have made it. Raises as `FileSystem.open_write`."""
        how, jobs = self._how, self._jobs
        jobs.step = "open"
        # Whole pages: a padded end that made the file grow would be written alone, under the inode's lock.
        reserved_bytes = whole_pages(self.size_bytes) if how.direct else self.size_bytes
        more: Any = {"shared": True} if how.share is not None else {} if sharing is None else sharing.what_to_write()
        filesystem = self._disk.filesystem
        file = await filesystem.open_write(path, reserved_bytes, direct=how.direct, executor=jobs, **more)
        self._opened, self.direct = file, file.direct
        if sharing is not None and sharing.is_sure:
            await self._do("open", lambda: sharing.clone_likely(file), is_timed=True)
        self._is_ready = True

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

    async def _write_once_more(self, first: WriteError) -> None:
        """To a new file, from staging memory; where that cannot be, the first failure stands, and says why."""
        why = await self._start_over(first)
        if why:
            first.message += f"; it is not written once more: {why}"
            self._first = None
            return
        report(logging.WARNING, "%r is written once more, to a new file, after: %s", self.path, first)
        try:
            await self._put_on_disk()
        except WriteError as second:
            second.message += f" (when it was written once more, after: {first})"
            raise

    async def _start_over(self, first: WriteError) -> str:
        """Delete what was written, and queue all chunks again; why that cannot be done, or "". A full disk counts once
        earlier commits and retention have made room."""
        while not await self._has_settled() or self._num_chunk_jobs:
            if self._num_chunk_jobs:
                # A job's thread still looks at how its chunk has ended, and tells when it has.
                await self._changed.wait()
        path, disk, filesystem, step = self.path, self._disk, self._disk.filesystem, "room for another try"
        try:
            with contextlib.suppress(FileNotFoundError):
                await self._do(step, lambda: filesystem.unlink(path))
            if first.errno in FULL:
                if disk.make_room is not None:
                    await disk.make_room(self._how.tag)
                free_bytes = await self._do(step, lambda: filesystem.free_bytes(os.path.dirname(path)))
                if free_bytes < self.size_bytes:
                    return f"retention has freed no room, {free_bytes} bytes are free"
        except OSError as error:
            return str(error)
        with self._lock:
            if self._first is not first or self._is_over:
                return "it was given up meanwhile"
            if not self._take_back():
                return "its bytes are not in staging memory any more"
            self._first, self._failure, self._may_rewrite = None, None, False
            self._opened, self._num_bytes_left = None, self.size_bytes
            if self.sharing is not None:
                # What is shared is shared again: bytes of frozen tensors are in the older file alone.
                self.sharing.shared_bytes = 0
        return ""
