"""Reads a zip container's directory without trusting it: which record lies where, and which CRC it should have.

Accepts exactly the shape that `torch.save` writes (stored records back to back, zip64 end record, no comment).
Everything is bounded by the file's size before it is used: a crafted file is an error, never a large allocation or an
offset outside the file.

A local header says how long its padding is, and so where the payload starts; reading thousands of them would cost a
seek each. But a payload ends where its data descriptor starts, and that ends where the next header starts: the
directory is enough to know where to look. What others read (torch looks at the local headers) is the same only where
those agree: `HeaderCheck` compares them as the file's bytes pass by, `check_headers` at once.
"""

from __future__ import annotations

import struct
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..errors import CorruptCheckpointError

DESCRIPTOR_MAGIC = b"PK\7\x08"
UINT32_MAX = 0xFFFFFFFF
ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
END64 = struct.Struct("<4sQHHIIQQQQ")
LOCATOR = struct.Struct("<4sIQI")
END = struct.Struct("<4sHHHHIIH")

_LOCAL = struct.Struct("<4s2xHH16xHH")
_TAIL_BYTES = END64.size + LOCATOR.size + END.size
_MAX_NAME_BYTES = 4096
_MAX_PADDING_BYTES = 65535

PRead = Callable[[int, int], "bytes | memoryview"]
"""`pread(offset, num_bytes)` returns exactly these bytes; it is only called with ranges inside the file."""


class UnusualLayoutError(Exception):
    """Perhaps a valid zip file, but not one laid out back to back as torch does."""


class Record(NamedTuple):
    """One record: its payload's extent, the CRC that it claims, and where its header and its directory entry stand."""

    offset: int
    num_bytes: int
    crc32: int
    zip_name: bytes = b""
    header_offset: int = 0
    entry_offset: int = 0

    @property
    def name(self) -> str:
        """Its name, without the archive's."""
        return self.zip_name.partition(b"/")[2].decode("utf-8", "replace")

    def check_header(self, data: bytes | memoryview, at: int = 0) -> None:
        """Compare the local header in `data` from `at` with what the directory says. Raises CorruptCheckpointError."""
        offset, _, _, zip_name, header_offset, _ = self
        magic, flags, method, name_bytes, extra_bytes = _LOCAL.unpack_from(data, at)
        name_at = at + _LOCAL.size
        is_same = magic == b"PK\3\4" and method == 0 and not flags & 1
        is_same = is_same and header_offset + _LOCAL.size + name_bytes + extra_bytes == offset
        if not is_same or bytes(data[name_at : name_at + len(zip_name)]) != zip_name:
            raise CorruptCheckpointError(
                f"record {self.name!a} has a local header that contradicts the directory", record=self.name
            )


def read_directory(pread: PRead, file_bytes: int) -> dict[str, Record]:
    """Every record by its name without the archive's, in file order, by two calls of `pread`. Raises
    CorruptCheckpointError: the directory is malformed or claims bytes outside the file. UnusualLayoutError: the records
    do not lie back to back, or not as they are."""
    count, directory, directory_bytes = _read_end(pread, file_bytes)
    raw = bytes(pread(directory, directory_bytes))
    entries: list[tuple[bytes, int, int, int, int]] = []
    at = 0
    for _ in range(count):
        entry, following = _read_entry(raw, at)
        entries.append((*entry, directory + at))
        at = following
    if at != directory_bytes:
        raise CorruptCheckpointError(
            f"zip directory has {directory_bytes - at} bytes more than its {count} entries need"
        )
    return _extents(entries, directory)


def check_headers(pread: PRead, records: Mapping[str, Record]) -> None:
    """Compare all local headers with the directory. Raises CorruptCheckpointError."""
    for record in records.values():
        record.check_header(pread(record.header_offset, _LOCAL.size + len(record.zip_name)))


class HeaderCheck:
    """Compares local headers with the directory as a file's bytes pass by, in any order. Any thread."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        self._records = list(records.values())
        self._starts = [record.header_offset for record in self._records]
        self._parts: dict[int, dict[int, bytes]] = {}

    def __call__(self, offset: int, view: memoryview) -> None:
        """Look at file bytes [offset, offset + len(view)). Raises CorruptCheckpointError."""
        end = offset + len(view)
        first = bisect_left(self._starts, offset - _LOCAL.size - _MAX_NAME_BYTES)
        for record in self._records[first : bisect_left(self._starts, end)]:
            low = record.header_offset
            num_bytes = _LOCAL.size + len(record.zip_name)
            high = low + num_bytes
            if offset <= low and high <= end:
                record.check_header(view, low - offset)
            elif high > offset:
                # It lies in two blocks: whichever comes last finds both parts.
                parts = self._parts.setdefault(low, {})
                parts[max(low, offset)] = bytes(view[max(low - offset, 0) : high - offset])
                if sum(map(len, parts.copy().values())) == num_bytes:
                    record.check_header(b"".join(part for _, part in sorted(parts.items())))


def _read_end(pread: PRead, file_bytes: int) -> tuple[int, int, int]:
    """(entry count, directory offset, directory size) from the three end records."""
    if file_bytes < _TAIL_BYTES:
        raise CorruptCheckpointError(f"file has {file_bytes} bytes, too few for a zip container")
    tail_offset = file_bytes - _TAIL_BYTES
    tail = pread(tail_offset, _TAIL_BYTES)
    magic, size, _, _, disk, first_disk, here, count, num_bytes, directory = END64.unpack_from(tail, 0)
    locator_magic, locator_disk, end64_offset, _ = LOCATOR.unpack_from(tail, END64.size)
    end = END.unpack_from(tail, END64.size + LOCATOR.size)
    if end[0] == b"PK\5\6" and end[7] == 0 and magic != b"PK\6\6" and locator_magic != b"PK\6\7":
        raise UnusualLayoutError("the zip archive ends without a zip64 end record, which torch.save writes")
    if (magic, size, locator_magic, end[0], end[7]) != (b"PK\6\6", END64.size - 12, b"PK\6\7", b"PK\5\6", 0):
        raise CorruptCheckpointError("file does not end in a zip64 end record: cut off, overwritten, or no torch file")
    claimed = (0, 0, min(count, 0xFFFF), min(count, 0xFFFF), min(num_bytes, UINT32_MAX), min(directory, UINT32_MAX))
    is_consistent = (disk, first_disk, locator_disk, here, end64_offset) == (0, 0, 0, count, tail_offset)
    if not is_consistent or tuple(end[1:7]) != claimed or directory + num_bytes != tail_offset:
        raise CorruptCheckpointError("zip end records contradict each other")
    if count * ENTRY.size > num_bytes:
        raise CorruptCheckpointError(f"zip directory claims {count} entries in {num_bytes} bytes")
    return count, directory, num_bytes


def _read_entry(raw: bytes, at: int) -> tuple[tuple[bytes, int, int, int], int]:
    """((name, offset of the local header, size, CRC), offset of the next entry) of the directory entry at `at`."""
    if at + ENTRY.size > len(raw):
        raise CorruptCheckpointError("zip directory is cut off inside an entry")
    magic, _, _, flags, method, _, _, crc, *numbers, header = ENTRY.unpack_from(raw, at)
    packed, size, name_bytes, extra_bytes, comment_bytes, disk, _, _ = numbers
    name_at = at + ENTRY.size
    following = name_at + name_bytes + extra_bytes
    is_sound = magic == b"PK\1\2" and following <= len(raw) and 0 < name_bytes <= _MAX_NAME_BYTES
    if not is_sound or comment_bytes or disk:
        raise CorruptCheckpointError("zip directory holds a malformed entry")
    name = raw[name_at : name_at + name_bytes]
    if UINT32_MAX in (size, packed, header):
        size, packed, header = _read_zip64(raw[name_at + name_bytes : following], size, packed, header, name)
    if method != 0 or flags & 1 or packed != size:
        raise UnusualLayoutError(f"record {name!r} is compressed or encrypted")
    return (name, header, size, crc), following


def _read_zip64(extra: bytes, size: int, packed: int, header: int, name: bytes) -> tuple[int, int, int]:
    """Replace the saturated 32-bit fields by those of the zip64 extra."""
    needed = [field == UINT32_MAX for field in (size, packed, header)]
    at = 0
    while at + 4 <= len(extra):
        kind, extra_bytes = struct.unpack_from("<HH", extra, at)
        if kind == 1 and extra_bytes >= 8 * sum(needed) and at + 4 + extra_bytes <= len(extra):
            wide = iter(struct.unpack_from(f"<{sum(needed)}Q", extra, at + 4))
            size, packed, header = (
                next(wide) if need else field for need, field in zip(needed, (size, packed, header), strict=True)
            )
            return size, packed, header
        at += 4 + extra_bytes
    raise CorruptCheckpointError(f"record {name!r} lacks its 64-bit sizes")


def _extents(entries: list[tuple[bytes, int, int, int, int]], directory: int) -> dict[str, Record]:
    archive = entries[0][0].partition(b"/")[0] + b"/" if entries else b""
    found: dict[str, Record] = {}
    previous_end, following = 0, iter([*[entry[1] for entry in entries[1:]], directory])
    for zip_name, header, size, crc, entry_offset in entries:
        end = next(following)
        wide = size >= UINT32_MAX or header >= UINT32_MAX
        offset = end - (0 if size == 0 else 24 if wide else 16) - size
        try:
            name = str(zip_name[len(archive) :], "utf-8")
        except UnicodeDecodeError as error:
            message = f"zip directory holds a record name that is not UTF-8: {zip_name!r}"
            raise CorruptCheckpointError(message) from error
        if header != previous_end or not 0 <= offset - header - _LOCAL.size - len(zip_name) <= _MAX_PADDING_BYTES:
            raise UnusualLayoutError(f"record {name!a} does not lie right behind the one before")
        if not zip_name.startswith(archive):
            raise UnusualLayoutError(f"record {name!a} is of another archive")
        found[name] = Record(offset, size, crc, zip_name, header, entry_offset)
        previous_end = end
    # torch finds records whatever the case of their names.
    if len({entry[0].lower() for entry in entries}) < len(entries):
        ((twice, _),) = Counter(entry[0].lower() for entry in entries).most_common(1)
        name = str(twice[len(archive) :], "utf-8", "replace")
        raise CorruptCheckpointError(f"zip directory names {name!a} twice", record=name)
    return found
