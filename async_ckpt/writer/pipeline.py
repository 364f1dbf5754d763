"""The way of one file through the loop: sealed, written, synced, closed.

Guarantees:
- Extents are sealed (CRC) strictly in file order; writes of one file overlap; fsync starts when the last one ended.
- After a failure nothing new is written, and the descriptor is closed only after all writes on it have ended, also
  when tasks were cancelled from outside.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar

from ..errors import CheckpointError, report
from ..storage.filesystem import FileSystem, WritableFile
from ..storage.write_error import write_error
from .file_write import Chunk, FileWrite, WrittenFile
from .io_mode import Arm, DiskTime
from .lane import Lane, Slots, ended, job_label, wake

T = TypeVar("T")
PAGE_BYTES = 4096


class Pipeline:
    """Moves one file; loop thread only, except `abandon` and `waiting_for`.

    Args:
        slots: writes in flight over all files.
        sealers: where `seal` runs.
        on_end: told when nothing of the file is in a thread any more, before the outcome is.
    """

    def __init__(
        self,
        file: FileWrite,
        lane: Lane,
        *,
        filesystem: FileSystem,
        loop: asyncio.AbstractEventLoop,
        slots: Slots,
        sealers: Executor,
        seal: Callable[[int, memoryview], int],
        make_parents: bool,
        arm: Arm,
        on_end: Callable[[Pipeline], None],
    ) -> None:
        self.file = file
        self.arm = arm
        self.disk_time = DiskTime()
        self._lane = lane
        self._filesystem = filesystem
        self._loop = loop
        self._slots = slots
        self._sealers = sealers
        self._seal = seal
        self._make_parents = make_parents
        self._on_end = on_end
        self._wake = asyncio.Event()
        self._gate = Slots(arm.depth)
        self._serving: asyncio.Task[None] | None = None
        self._has_begun = False
        self._is_settling = False
        self._tasks: list[asyncio.Task[Any]] = []
        self._crcs: list[int] = []
        self._opened: WritableFile | None = None
        self._waits_for = "its turn"

    def start(self) -> None:
        """Begin."""
        self._serving = self._loop.create_task(self._serve())
        self._serving.add_done_callback(self._ensure_told)

    def notice(self) -> None:
        """The caller queued a chunk, or the file failed."""
        self._wake.set()
        # A task that has not begun would be cancelled without ever running its clean-up.
        if self.file.failure is not None and self._serving is not None and self._has_begun and not self._is_settling:
            self._serving.cancel()

    def die(self, error: BaseException) -> None:
        """The pool is dead: tell the outcome now, clean up as far as that still works."""
        self.file.fail(error)
        self.notice()
        self.file.done.resolve(None, self.file.failure or error)

    def abandon(self) -> None:
        """No task will run any more: give memory back once no thread uses it. The descriptor is left to its owner."""
        self._lane.on_idle(self.file.release_all)

    def waiting_for(self) -> str:
        """What it waits for now, in words; any thread."""
        waits_for = self._waits_for if self._lane.path or not self._tasks else "the directory"
        return self._lane.oldest() or f"{waits_for} of {self.file.path}"

    async def _serve(self) -> None:
        self._has_begun = True
        written: WrittenFile | None = None
        try:
            if self.file.failure is None:
                written = await self._put_on_disk()
        except BaseException as error:  # noqa: BLE001 -- becomes the file's outcome
            self.file.fail(error)
        failure = self.file.seal()
        self._is_settling = True
        if failure is not None:
            await self._settle()
        self.file.release_all()
        self._on_end(self)
        self.file.done.resolve(written, failure)

    def _ensure_told(self, task: asyncio.Task[None]) -> None:
        """`done` resolves also when the task was cancelled before its first step, or its clean-up itself broke."""
        if task.cancelled() and not self._has_begun:
            self.file.fail(asyncio.CancelledError())
            self.start()
        elif not self.file.done.done():
            broken = asyncio.CancelledError() if task.cancelled() else task.exception()
            self.file.fail(broken or RuntimeError("the task ended without an outcome"))
            self.abandon()
            self._on_end(self)
            self.file.done.resolve(None, self.file.failure or broken)

    async def _put_on_disk(self) -> WrittenFile:
        opening: asyncio.Task[WritableFile] | None = None
        sealed = 0
        while sealed < self.file.size_bytes:
            chunk = await self._next_chunk()
            # Not before: to reserve the file's blocks takes milliseconds of a core, while the caller copies on all of them.
            opening = opening or self._spawn(self._open())
            await self._seal_chunk(chunk)
            self._spawn(self._write(chunk, opening))
            sealed += chunk.nbytes
        opening = opening or self._spawn(self._open())
        self._waits_for = "a free writer"
        await asyncio.wait(self._tasks)
        if self.file.failure is not None:
            raise self.file.failure
        return await self._make_durable(opening.result())

    async def _make_durable(self, opened: WritableFile) -> WrittenFile:
        self._waits_for = "fsync"
        if self.arm.direct and self.file.size_bytes % PAGE_BYTES:
            await self._as("truncate", opened.truncate(self.file.size_bytes))
        await self._as("fsync", opened.fsync())
        durable_s = time.perf_counter()
        self.disk_time.end(durable_s)
        await self._as("close", opened.close())
        self._opened = None
        seconds = self._lane.seconds
        return WrittenFile(
            path=opened.path,
            size_bytes=self.file.size_bytes,
            extent_bytes=self.file.extent_bytes,
            extent_crc32=tuple(self._crcs),
            direct=opened.direct,
            crc_s=seconds.get("crc", 0.0),
            write_s=seconds.get("write", 0.0),
            sync_s=seconds.get("fsync", 0.0),
            durable_s=durable_s,
        )

    async def _open(self) -> WritableFile:
        path = location if isinstance(location := self.file.location, str) else await ended(location)
        self._lane.path = path
        if self._make_parents:
            await asyncio.wrap_future(self._lane.submit(self._make_parents_of, path))
        # Reserving whole pages keeps the padded end from growing the file, which would run alone under the inode's lock.
        reserved_bytes = _whole_pages(self.file.size_bytes) if self.arm.direct else self.file.size_bytes
        opened = self._filesystem.open_write(path, reserved_bytes, direct=self.arm.direct, executor=self._lane)
        self._opened = await self._as("open", opened)
        return self._opened

    def _make_parents_of(self, path: str) -> None:
        folder = os.path.dirname(path)
        try:
            self._filesystem.makedirs(folder)
        except OSError as error:
            message = "the directory of a file cannot be made in the staging directory; the file is not committed"
            raise write_error(self._filesystem, error, message, folder) from error

    async def _next_chunk(self) -> Chunk:
        self._waits_for = f"the chunk at offset {len(self._crcs) * self.file.extent_bytes}"
        while (chunk := self.file.take()) is None:
            await self._wake.wait()
            self._wake.clear()
        return chunk

    async def _seal_chunk(self, chunk: Chunk) -> None:
        self._waits_for = f"the CRC of the chunk at offset {chunk.offset}"
        job_label.set(("crc", chunk.offset, chunk.nbytes))
        sealed = self._lane.submit_to(self._sealers, self._seal, chunk.offset, chunk.buffer[: chunk.nbytes])
        self._crcs.append(await asyncio.wrap_future(sealed))

    async def _write(self, chunk: Chunk, opening: asyncio.Task[WritableFile]) -> None:
        file = await asyncio.shield(opening)
        await self._gate.acquire()
        try:
            await self._slots.acquire()
            try:
                self.disk_time.begin_write(time.perf_counter())
                await self._as("write", file.pwrite(_bytes_to_write(chunk, file), chunk.offset), chunk.offset, chunk.nbytes)
                self.file.written_bytes += chunk.nbytes
            finally:
                self.disk_time.end_write(time.perf_counter())
                self._slots.release()
        finally:
            self._gate.release()
        self.file.release(chunk.offset)

    @staticmethod
    async def _as(kind: str, work: Coroutine[Any, Any, T], offset: int = 0, num_bytes: int = 0) -> T:
        """Await `work` with its jobs labelled; each task has a context of its own."""
        job_label.set((kind, offset, num_bytes))
        return await work

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = self._loop.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            self.file.fail(error)

    async def _settle(self) -> None:
        """After a failure: wait until nothing of this file is in a thread, then close it. Nothing can cut this short."""
        self._waits_for = "the end of what is in flight"
        for task in self._tasks[1:]:
            task.cancel()
        if self._tasks and not self._lane.path:
            # Only while it waits for its location: a cancelled open could leave a descriptor that nobody knows.
            self._tasks[0].cancel()
        while not await self._has_settled():
            pass

    async def _has_settled(self) -> bool:
        """One round of waiting; False when there is more to wait for, or somebody cancelled the wait."""
        try:
            if pending := [task for task in self._tasks if not task.done()]:
                await asyncio.wait(pending)
                return False
            if not self._lane.is_idle:
                loop, idle = self._loop, self._loop.create_future()
                self._lane.on_idle(lambda: wake(loop, idle))
                await idle
                return False
            if self._opened is not None:
                await self._as("close", self._opened.close())
        except asyncio.CancelledError:
            return False
        except (CheckpointError, OSError, RuntimeError) as late:
            report(logging.INFO, "closing %s after %r: %r", self.file.path, self.file.failure, late)
        self._opened = None
        return True


def _bytes_to_write(chunk: Chunk, file: WritableFile) -> memoryview:
    """The chunk's bytes, in whole pages where the file wants them: one write, and the truncation cuts the rest."""
    end = _whole_pages(chunk.nbytes)
    if not file.direct or end == chunk.nbytes or chunk.buffer.nbytes < end:
        return chunk.buffer[: chunk.nbytes]
    chunk.buffer[chunk.nbytes : end] = bytes(end - chunk.nbytes)
    return chunk.buffer[:end]


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
