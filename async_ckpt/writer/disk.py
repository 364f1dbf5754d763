"""What the files of one pool share: the seam to the disk, the threads, the slots, the count of chunks."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from typing import Any

from ..errors import CheckpointError, WriteError
from ..format.chunk import Chunk
from ..metrics import Span
from ..storage.filesystem import FileSystem
from ..storage.write_error import write_error
from ..storage.write_file import WritableFile
from ..threads.executor import DaemonExecutor
from ..threads.locks import Lock
from ..threads.loop import LoopThread

PAGE_BYTES = 4096
MakeRoom = Callable[[str], Coroutine[Any, Any, None]]


class Disk:
    """What the files of one pool share. Any thread but a user's, where nothing else is said; nothing blocks but
    `make_parents`.

    Args:
        num_slots: how many chunks of all files may be written at once.
        on_span: told about every piece of work on a file, on the thread that did it; must be quick and not raise.
        make_room: waits until earlier commits than that of a tag, and what they delete, are over.
    """

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
        """Chunks were taken over (+) or released (-). Any thread."""
        with self._lock:
            self.num_queued += change
            self._max_queued = max(self._max_queued, self.num_queued)

    def restart_max_queued(self) -> int:
        """The most chunks that were queued since this was last asked. Any thread."""
        with self._lock:
            most, self._max_queued = self._max_queued, self.num_queued
        return most

    def make_parents(self, path: str) -> None:
        """Make the missing parent directories of a file. Blocks. Raises WriteError, OutOfSpaceError."""
        folder = os.path.dirname(path)
        try:
            self.filesystem.makedirs(folder)
        except OSError as error:
            message = "the directory of a file cannot be made in the staging directory; the file is not committed"
            raise write_error(self.filesystem, error, message, folder) from error


def in_our_tree(error: BaseException, path: str) -> BaseException:
    """`error`, which ended the writing of `path`, as one of our tree."""
    if isinstance(error, CheckpointError):
        return error
    reason = "a writer task was cancelled" if isinstance(error, asyncio.CancelledError) else repr(error)
    code = error.errno if isinstance(error, OSError) else None
    failure = WriteError(f"writing {path!r} stopped ({reason}); it is incomplete and is not committed", errno=code)
    failure.__cause__ = error
    return failure


def bytes_to_write(chunk: Chunk, file: WritableFile) -> memoryview:
    """The chunk's bytes, in whole pages where the file wants them: one write, and the truncation cuts the rest."""
    end = whole_pages(chunk.nbytes)
    if not file.direct or end == chunk.nbytes or chunk.buffer.nbytes < end:
        return chunk.buffer[: chunk.nbytes]
    chunk.buffer[chunk.nbytes : end] = bytes(end - chunk.nbytes)
    return chunk.buffer[:end]


def whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


def problem_with(chunk: Chunk, next_offset: int, extent_bytes: int, size_bytes: int) -> str | None:
    """Why `chunk` is not the next one of a file of `size_bytes` bytes, cut into extents of `extent_bytes` (0: not known
    yet).
    """
    if chunk.offset != next_offset:
        return f"out of order, the next offset is {next_offset}"
    end = chunk.offset + chunk.nbytes
    if end > size_bytes or (chunk.nbytes == 0 and size_bytes > 0):
        return f"the file has {size_bytes} bytes"
    if extent_bytes and chunk.nbytes != extent_bytes and (end != size_bytes or chunk.nbytes > extent_bytes):
        return f"all chunks but the last must have {extent_bytes} bytes"
    if chunk.buffer.nbytes < chunk.nbytes:
        return f"its buffer has only {chunk.buffer.nbytes} bytes"
    return None
