"""What goes through the pool, and how much of it at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..format.chunk import Chunk
from ..storage.filesystem import WritableFile
from ..threads.locks import Lock

__all__ = ["PAGE_BYTES", "Chunk", "Slots", "WrittenFile", "bytes_to_write", "whole_pages"]

PAGE_BYTES = 4096


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


class Slots:
    """How many chunks of all files may be written at once. First come, first served; any thread but a user's, never blocks."""

    def __init__(self, num_slots: int) -> None:
        self._lock = Lock()
        self._num_free = num_slots
        self._waiting: dict[Callable[[], None], None] = {}

    def take(self, try_again: Callable[[], None]) -> bool:
        """Take a slot; False when there is none: `try_again` is called once there is one."""
        with self._lock:
            if self._num_free:
                self._num_free -= 1
                return True
            self._waiting[try_again] = None
            return False

    def give_back(self) -> None:
        """Let those who wait try again while there is one."""
        with self._lock:
            self._num_free += 1
        while (try_again := self._next()) is not None:
            try_again()

    def _next(self) -> Callable[[], None] | None:
        with self._lock:
            first = next(iter(self._waiting), None) if self._num_free else None
            if first is not None:
                del self._waiting[first]
            return first


def bytes_to_write(chunk: Chunk, file: WritableFile) -> memoryview:
    """The chunk's bytes, in whole pages where the file wants them: one write, and the truncation cuts the rest."""
    end = whole_pages(chunk.nbytes)
    if not file.direct or end == chunk.nbytes or chunk.buffer.nbytes < end:
        return chunk.buffer[: chunk.nbytes]
    chunk.buffer[chunk.nbytes : end] = bytes(end - chunk.nbytes)
    return chunk.buffer[:end]


def whole_pages(nbytes: int) -> int:
    """`nbytes`, rounded up."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES
