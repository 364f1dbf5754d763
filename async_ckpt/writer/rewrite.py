"""A file that is written once more, to a new file, where its disk has failed for a moment: from staging memory.

Guarantees:
- Never on the same descriptor: after a failed write or fsync the kernel may have dropped pages, and call the next one
  good. The old file is deleted, and a new one written as a whole.
- Written chunks are kept until the file is synced, but no save waits for their memory: it is given back where that is
  wanted, and the first failure stands then. So it does where a file is larger than the free staging memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from concurrent.futures import Future
from typing import Any

from ..errors import WriteError, report
from ..format.chunk import Chunk
from ..storage.write_error import FULL, MOMENTARY
from .file import FileWrite


class RewritingFile(FileWrite):
    """As `FileWrite`. A full disk counts once earlier commits and retention have made room."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._first: WriteError | None = None
        """The failure after which it is to be written once more."""
        self._is_second = False
        self._queue.keeps = True

    def let_go(self) -> bool:
        """Give back what is only kept for a second try; False where nothing is. Any thread; never blocks."""
        return self._queue.let_go()

    def _is_late(self) -> bool:
        return self._is_over or (self._failure is not None and self._first is None)

    def _fail(self, error: BaseException, *, keep: bool = False) -> None:
        with self._lock:
            if keep or self._is_over:
                # It was given up: no second try.
                self._first = None
            elif self._failure is None and isinstance(error, WriteError) and not self._is_second:
                self._first = error if error.errno in MOMENTARY | FULL else None
        super()._fail(error, keep=keep)

    def die(self, error: BaseException) -> None:
        self._is_second = True
        super().die(error)

    def _chunk_ended(self, chunk: Chunk, ended: Future[bool]) -> None:
        super()._chunk_ended(chunk, ended)
        if self._failure is not None:
            # `_start_over` waits for those that succeed too.
            self._notify()

    async def _put_on_disk(self) -> None:
        try:
            return await super()._put_on_disk()
        except BaseException as error:  # noqa: BLE001 -- raised again where it stands
            self._fail(error)
        first = self._first
        if first is None:
            assert self._failure is not None
            raise self._failure
        why = await self._start_over(first)
        if why:
            first.message += f"; it is not written once more: {why}"
            self._first = None
            raise first
        report(logging.WARNING, "%r is written once more, to a new file, after: %s", self.path, first)
        try:
            await super()._put_on_disk()
        except WriteError as second:
            second.message += f" (when it was written once more, after: {first})"
            raise

    async def _start_over(self, first: WriteError) -> str:
        """Delete what was written, and queue all chunks again; why that cannot be done, or ""."""
        while not await self._has_settled() or self._num_chunk_jobs:
            if self._num_chunk_jobs:
                # A job's thread still looks at how its chunk has ended, and tells when it has.
                await self._changed.wait()
        path, disk, jobs = self.path, self._disk, self._jobs
        jobs.step = "room for another try"
        try:
            await asyncio.wrap_future(jobs.run(lambda: _discard(disk.filesystem, path)))
            if first.errno in FULL:
                if disk.make_room is not None:
                    await disk.make_room(self._how.tag)
                folder = os.path.dirname(path)
                free_bytes = await asyncio.wrap_future(jobs.run(lambda: disk.filesystem.free_bytes(folder)))
                if free_bytes < self.size_bytes:
                    return f"retention has freed no room, {free_bytes} bytes are free"
        except OSError as error:
            return str(error)
        with self._lock:
            if self._first is not first or self._is_over:
                return "it was given up meanwhile"
            if not self._queue.take_back():
                return "its bytes are not in staging memory any more"
            self._first, self._failure, self._is_second = None, None, True
            self._opened, self._num_bytes_left = None, self.size_bytes
            if self.sharing is not None:
                # What is shared is shared again: bytes of frozen tensors are in the older file alone.
                self.sharing.shared_bytes = 0
        return ""


def _discard(filesystem: Any, path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        filesystem.unlink(path)
