"""What goes into a file, and what has come of it."""

from __future__ import annotations

from dataclasses import dataclass

from ..format.chunk import Chunk
from ..storage.write_file import WritableFile

__all__ = ["PAGE_BYTES", "Chunk", "WrittenFile", "bytes_to_write", "problem_with", "whole_pages"]

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
