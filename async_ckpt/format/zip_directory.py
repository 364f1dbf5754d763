"""Read a zip container's directory without trusting it: which record lies where, and which CRC it should have.

Accepts exactly the shape `torch.save` writes (stored records, zip64 end record, no comment). Everything read is bounded by the file's
size before it is used: a crafted file is a `CorruptCheckpointError`, never a large allocation or an offset outside the file.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CorruptCheckpointError

DESCRIPTOR_MAGIC = b"PK\7\x08"
UINT32_MAX = 0xFFFFFFFF
MAX_DIRECTORY_BYTES = 1 << 30
_MAX_NAME_BYTES = 4096

ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
LOCAL = struct.Struct("<4sHHHHHIIIHH")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")
_TAIL_NBYTES = _END64.size + _LOCATOR.size + _END.size

PRead = Callable[[int, int], bytes]
"""`pread(offset, nbytes)` returns exactly these bytes; it is only called with ranges inside the file."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its name inside the zip, its payload's extent, the CRC it claims, and where its directory entry stands."""

    name: str
    offset: int
    nbytes: int
    crc32: int
    entry_offset: int


def read_directory(pread: PRead, file_bytes: int) -> list[Record]:
    """Every record of the container, in file order, from its central directory.

    Any thread; blocks in `pread` (one call per record, plus two). Raises CorruptCheckpointError for anything that is not a plain
    torch container: wrong magic, compression, sizes or offsets outside the file, overlapping or duplicate records.
    """
    count, directory, nbytes = read_end(pread, file_bytes)
    raw = pread(directory, nbytes)
    records: list[Record] = []
    names: set[str] = set()
    at, previous_end = 0, 0
    for _ in range(count):
        record, previous_end, at = _read_entry(pread, raw, at, directory, previous_end)
        if record.name in names:
            raise CorruptCheckpointError(f"zip directory names {record.name!r} twice", record=record.name)
        names.add(record.name)
        records.append(record)
    if at != nbytes:
        raise CorruptCheckpointError(f"zip directory has {nbytes - at} bytes more than its {count} entries need")
    return records


def read_end(pread: PRead, file_bytes: int) -> tuple[int, int, int]:
    """(entry count, directory offset, directory size) from the three end records."""
    if file_bytes < _TAIL_NBYTES:
        raise CorruptCheckpointError(f"file has {file_bytes} bytes, too few for a zip container")
    tail_offset = file_bytes - _TAIL_NBYTES
    tail = pread(tail_offset, _TAIL_NBYTES)
    magic, size, _, _, disk, first_disk, here, count, nbytes, directory = _END64.unpack_from(tail, 0)
    locator_magic, locator_disk, end64_offset, _ = _LOCATOR.unpack_from(tail, _END64.size)
    end = _END.unpack_from(tail, _END64.size + _LOCATOR.size)
    if magic != b"PK\6\6" or size != _END64.size - 12 or locator_magic != b"PK\6\7" or end[0] != b"PK\5\6" or end[7] != 0:
        raise CorruptCheckpointError("file does not end in a zip64 end record: cut off, overwritten, or no torch file")
    if disk or first_disk or locator_disk or here != count or end64_offset != tail_offset:
        raise CorruptCheckpointError("zip end records contradict each other")
    claimed = (0, 0, min(count, 0xFFFF), min(count, 0xFFFF), min(nbytes, UINT32_MAX), min(directory, UINT32_MAX))
    if tuple(end[1:7]) != claimed or directory + nbytes != tail_offset:
        raise CorruptCheckpointError("zip end records contradict each other")
    if nbytes > MAX_DIRECTORY_BYTES or count * ENTRY.size > nbytes:
        raise CorruptCheckpointError(f"zip directory claims {count} entries in {nbytes} bytes")
    return count, directory, nbytes


def _read_entry(pread: PRead, raw: bytes, at: int, directory: int, previous_end: int) -> tuple[Record, int, int]:
    """One directory entry and the local header it points at; returns (record, end of its payload, next entry)."""
    if at + ENTRY.size > len(raw):
        raise CorruptCheckpointError("zip directory is cut off inside an entry")
    fields = ENTRY.unpack_from(raw, at)
    magic, _, _, flags, method, _, _, crc, packed, nbytes, name_nbytes, extra_nbytes, comment_nbytes, disk, _, _, header = fields
    name_at = at + ENTRY.size
    following = name_at + name_nbytes + extra_nbytes
    if magic != b"PK\1\2" or following > len(raw) or not 0 < name_nbytes <= _MAX_NAME_BYTES or comment_nbytes or disk:
        raise CorruptCheckpointError("zip directory holds a malformed entry")
    raw_name = raw[name_at : name_at + name_nbytes]
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorruptCheckpointError(f"zip directory holds a record name that is not UTF-8: {raw_name!r}") from error
    if method != 0 or flags & 0x0001:
        raise CorruptCheckpointError(f"record {name!r} is compressed or encrypted; torch stores records plainly", record=name)
    nbytes, packed, header = read_zip64(raw[name_at + name_nbytes : following], nbytes, packed, header, name)
    if packed != nbytes:
        raise CorruptCheckpointError(f"record {name!r} claims two sizes, {packed} and {nbytes} bytes", record=name)
    if header < previous_end or header + LOCAL.size + name_nbytes > directory:
        raise CorruptCheckpointError(f"record {name!r} overlaps another one or lies outside the file (header at {header})", record=name)
    local = pread(header, LOCAL.size + name_nbytes)
    values = LOCAL.unpack_from(local, 0)
    if values[0] != b"PK\3\4" or values[3] != 0 or values[9] != name_nbytes or local[LOCAL.size :] != raw_name:
        raise CorruptCheckpointError(f"record {name!r} has a local header that contradicts the directory", record=name)
    offset = header + LOCAL.size + name_nbytes + values[10]
    if offset + nbytes > directory:
        raise CorruptCheckpointError(f"record {name!r} claims bytes {offset}..{offset + nbytes}, past the payload area", record=name)
    return Record(name, offset, nbytes, crc, directory + at), offset + nbytes, following


def read_zip64(extra: bytes, nbytes: int, packed: int, header: int, name: str) -> tuple[int, int, int]:
    """Replace the saturated 32-bit fields by those of the zip64 extra."""
    needed = [nbytes == UINT32_MAX, packed == UINT32_MAX, header == UINT32_MAX]
    if not any(needed):
        return nbytes, packed, header
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1 and size >= 8 * sum(needed) and at + 4 + size <= len(extra):
            wide = iter(struct.unpack_from(f"<{sum(needed)}Q", extra, at + 4))
            values = [next(wide) if need else value for need, value in zip(needed, (nbytes, packed, header), strict=True)]
            return values[0], values[1], values[2]
        at += 4 + size
    raise CorruptCheckpointError(f"record {name!r} lacks its 64-bit sizes", record=name)
