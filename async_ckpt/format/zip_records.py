"""Where each record's bytes lie, from the zip directory at the file's end alone.

A local header says how long its padding is, and so where the payload starts; reading thousands of them would cost a
seek each. But a payload ends where its data descriptor starts, and that ends where the next header starts: the
directory is enough. Files laid out otherwise are refused here and left to torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CorruptCheckpointError
from .zip_directory import ENTRY, LOCAL, UINT32_MAX, PRead, read_end, read_zip64

_PADDING_BYTES = 65535


class UnusualLayoutError(Exception):
    """Perhaps a valid zip file, but not one laid out back to back as torch does."""


@dataclass(frozen=True, slots=True)
class RecordExtent:
    """Payload of one record: `num_bytes` bytes from `offset` in the file, and the CRC the directory claims."""

    offset: int
    num_bytes: int
    crc32: int


def record_extents(pread: PRead, file_bytes: int) -> dict[str, RecordExtent]:
    """Payload extents by record name, without the archive's name, in file order. Blocks in `pread` (two calls).

    Raises:
        CorruptCheckpointError: the directory is malformed or claims bytes outside the file.
        UnusualLayoutError: the records do not lie back to back.
    """
    count, directory, directory_bytes = read_end(pread, file_bytes)
    raw = pread(directory, directory_bytes)
    entries: list[tuple[str, int, int, int, int]] = []
    at = 0
    for _ in range(count):
        if at + ENTRY.size > len(raw):
            raise CorruptCheckpointError("zip directory is cut off inside an entry")
        _, _, _, flags, method, _, _, crc, packed, size, name_bytes, extra_bytes, comment_bytes, _, _, _, header = ENTRY.unpack_from(
            raw, at
        )
        name_at = at + ENTRY.size
        at = name_at + name_bytes + extra_bytes + comment_bytes
        if at > len(raw):
            raise CorruptCheckpointError("zip directory is cut off inside an entry")
        name = str(raw[name_at : name_at + name_bytes], "utf-8", "replace")
        extra = bytes(raw[name_at + name_bytes : name_at + name_bytes + extra_bytes])
        size, packed, header = read_zip64(extra, size, packed, header, name)
        if method != 0 or flags & 1 or packed != size:
            raise UnusualLayoutError(f"record {name!r} is compressed or encrypted")
        entries.append((name.partition("/")[2], header, size, crc, LOCAL.size + name_bytes))
    return _extents(entries, directory)


def _extents(entries: list[tuple[str, int, int, int, int]], directory: int) -> dict[str, RecordExtent]:
    found: dict[str, RecordExtent] = {}
    previous_end = 0
    for i, (name, header, size, crc, header_bytes) in enumerate(entries):
        following = entries[i + 1][1] if i + 1 < len(entries) else directory
        wide = size >= UINT32_MAX or header >= UINT32_MAX
        descriptor_bytes = 0 if size == 0 else 24 if wide else 16
        offset = following - descriptor_bytes - size
        if header != previous_end or not 0 <= offset - header - header_bytes <= _PADDING_BYTES:
            raise UnusualLayoutError(f"record {name!r} does not lie right behind the one before")
        if name in found:
            raise CorruptCheckpointError(f"zip directory names {name!r} twice", record=name)
        found[name] = RecordExtent(offset, size, crc)
        previous_end = following
    return found
