"""The zip container that `torch.save` writes, as plain arithmetic: no torch, no I/O.

    record  = local header (30) + name + [zip64 extra] + "FB" padding extra + payload + data descriptor
    file    = data.pkl, .format_version, .storage_alignment, byteorder, data/0.., version, .data/serialization_id,
              central directory, zip64 end record + locator, end record

Padding makes every payload start on a multiple of the alignment. An empty record has flag bit 3 clear and no
descriptor. A record gets zip64 fields where its size or the offset of its header reaches 2^32 - 1, and its descriptor
grows to 24 bytes. CRCs stand only behind the payload (descriptor, central directory), so one sequential pass can fill
them in.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from .checksum import crc32
from .zip_directory import DESCRIPTOR_MAGIC, END, END64, ENTRY, LOCATOR, UINT32_MAX

_MAX_ALIGNMENT = 65536
APART_BYTES = 1 << 20
ARCHIVE = b"archive/"
SERIALIZATION_ID_NBYTES = 40
_UINT16_MAX = 0xFFFF

_LOCAL_HEADER = b"PK\3\4\0\0" + struct.pack("<H", 0x0808) + bytes(18)
_LOCAL_HEADER_EMPTY = b"PK\3\4\0\0" + struct.pack("<H", 0x0800) + bytes(18)


@dataclass(frozen=True, slots=True)
class SealMap:
    """Where the bytes lie that depend on payload CRCs, and what else goes into the serialization id. Offsets are file
    offsets.
    """

    entry_crc_offsets: Sequence[int]
    """One per non-empty payload: its CRC field in the central directory. The descriptor's one is 4 bytes behind the
    payload.
    """
    id_offset: int
    """The 40 digits of the serialization id."""
    id_crc_offsets: tuple[int, int]
    """CRC fields of the id record: descriptor, central directory."""
    crcs_before: tuple[int, ...]
    """CRCs of the non-empty records before the first payload, in file order."""
    crcs_after: tuple[int, ...]
    """CRCs of the non-empty records between the last payload and the id."""
    name_hash: bytes
    """First 20 digits of the id: a hash of the record names alone."""


@dataclass(frozen=True, slots=True)
class Container:
    """Every byte of a file that is not payload, and where the payloads go. Never changes."""

    file_bytes: int
    literals: tuple[tuple[int, bytes], ...]
    """(file offset, bytes), ascending; with the payloads they tile the file. What depends on payload CRCs is zero until
    sealed.
    """
    payload_offsets: Sequence[int]
    payload_nbytes: Sequence[int]
    """Ascending, none empty, none overlapping."""
    seal_map: SealMap | None = field(repr=False, default=None)
    alignment: int = 1
    directory_offset: int = 0


class _Builder:
    """Appends records and keeps literals, payload extents and central-directory entries."""

    def __init__(self, alignment: int) -> None:
        self.alignment = alignment
        self.padding = b"Z" * alignment
        self.pos = 0
        self.literals: list[tuple[int, bytes]] = []
        self.run: list[bytes] = []
        self.run_start = 0
        self.entries: list[bytes] = []
        self.entries_nbytes = 0
        self.payload_offsets: list[int] = []
        self.payload_nbytes: list[int] = []
        self.payload_entries: list[int] = []
        self.crcs: list[int] = []
        """Of the records whose bytes are known."""

    def _header(self, name: bytes, nbytes: int) -> None:
        pos = self.pos
        # The compressed size is 0 here: torch's zip writer learns it only after the data.
        zip64 = _zip64(nbytes, 0, pos)
        start = pos + 30 + len(name) + len(zip64) + 4
        # Where an alignment of almost 64 KiB needs more padding than a zip header holds, torch writes a file that
        # nobody can read. Here that one payload starts a few bytes early instead.
        pad_nbytes = min(-start % self.alignment, _UINT16_MAX - 4 - len(zip64))
        extra_nbytes = len(zip64) + 4 + pad_nbytes
        prefix = _LOCAL_HEADER if nbytes else _LOCAL_HEADER_EMPTY
        lengths = struct.pack("<HH", len(name), extra_nbytes)
        self.run.append(
            prefix + lengths + name + zip64 + b"FB" + pad_nbytes.to_bytes(2, "little") + self.padding[:pad_nbytes]
        )
        self.pos = start + pad_nbytes

    def _close(self, name: bytes, nbytes: int, header_offset: int, crc: int) -> None:
        if nbytes:
            wide = nbytes >= UINT32_MAX or header_offset >= UINT32_MAX
            descriptor = DESCRIPTOR_MAGIC + struct.pack("<IQQ" if wide else "<III", crc, nbytes, nbytes)
            self.run.append(descriptor)
            self.pos += len(descriptor)
        entry = _central_entry(name, nbytes, header_offset, crc)
        self.entries.append(entry)
        self.entries_nbytes += len(entry)

    def add_literal(self, name: bytes, *pieces: bytes, crc: int | None = None) -> tuple[int, int]:
        """Append a record whose bytes are known; returns its payload offset and its entry's offset inside the
        directory. Of several pieces, large ones become literals as they are.
        """
        header_offset, nbytes, name = self.pos, sum(map(len, pieces)), ARCHIVE + name
        crc = reduce(lambda before, piece: crc32(piece, before), pieces, 0) if crc is None else crc
        self.crcs.append(crc)
        self._header(name, nbytes)
        offset, entry_at = self.pos, self.entries_nbytes
        for piece in pieces:
            is_apart = len(piece) >= APART_BYTES and len(pieces) > 1
            if is_apart:
                self.flush()
            self.run.append(piece)
            self.pos += len(piece)
            if is_apart:
                self.flush()
        self._close(name, nbytes, header_offset, crc)
        return offset, entry_at

    def add_payload(self, key: int, nbytes: int) -> None:
        """Append the record of a storage, whose bytes come later."""
        header_offset, name = self.pos, ARCHIVE + b"data/%d" % key
        self._header(name, nbytes)
        if nbytes:
            self.payload_entries.append(self.entries_nbytes)
            self.payload_offsets.append(self.pos)
            self.payload_nbytes.append(nbytes)
            self.flush()
            self.pos += nbytes
            self.run_start = self.pos
        self._close(name, nbytes, header_offset, 0)

    def flush(self) -> None:
        """End the current literal: a payload starts here, a large piece, or the file ends."""
        self.literals.append((self.run_start, b"".join(self.run)))
        self.run, self.run_start = [], self.pos

    def finish(self) -> int:
        """Append the central directory and the end records; returns the directory's offset."""
        directory = self.pos
        nbytes, count, end = self.entries_nbytes, len(self.entries), directory + self.entries_nbytes
        self.run += self.entries
        self.run.append(END64.pack(b"PK\6\6", 44, 0x031E, 45, 0, 0, count, count, nbytes, directory))
        self.run.append(LOCATOR.pack(b"PK\6\7", 0, end, 1))
        few, size32, offset32 = min(count, _UINT16_MAX), min(nbytes, UINT32_MAX), min(directory, UINT32_MAX)
        self.run.append(END.pack(b"PK\5\6", 0, 0, few, few, size32, offset32, 0))
        self.flush()
        self.pos = end + END64.size + LOCATOR.size + END.size
        return directory


def _zip64(nbytes: int, packed_nbytes: int, header_offset: int) -> bytes:
    """The extra field for what 32 bits do not hold; empty where they do."""
    fields = struct.pack("<QQ", nbytes, packed_nbytes) if nbytes >= UINT32_MAX else b""
    fields += struct.pack("<Q", header_offset) if header_offset >= UINT32_MAX else b""
    return struct.pack("<HH", 1, len(fields)) + fields if fields else b""


def _central_entry(name: bytes, nbytes: int, header_offset: int, crc: int) -> bytes:
    extra = _zip64(nbytes, nbytes, header_offset)
    flags = 0x0808 if nbytes else 0x0800
    size32, offset32 = min(nbytes, UINT32_MAX), min(header_offset, UINT32_MAX)
    head = ENTRY.pack(b"PK\1\2", 0, 0, flags, 0, 0, 0, crc, size32, size32, len(name), len(extra), 0, 0, 0, 0, offset32)
    return head + name + extra


def _begin(alignment: int, pickled: Sequence[bytes]) -> _Builder:
    """With the records before the first payload."""
    builder = _Builder(alignment)
    builder.add_literal(b"data.pkl", *pickled)
    builder.add_literal(b".format_version", b"1")
    builder.add_literal(b".storage_alignment", b"%d" % alignment)
    builder.add_literal(b"byteorder", sys.byteorder.encode())
    return builder


def lay_out(
    pickle_bytes: bytes | Sequence[bytes], storage_nbytes: Sequence[int], *, name_hash: bytes, alignment: int = 64
) -> Container:
    """The container that `torch.save` writes around `pickle_bytes` and storages of these sizes, in key order.

    Where the pickle comes in pieces, those of `APART_BYTES` or more become literals as they are, without a copy.
    `name_hash`: the 20 digits torch gives to this set of record names. Costs about 4 us per storage.
    Raises ValueError for an alignment outside 1..65536.
    """
    if not 1 <= alignment <= _MAX_ALIGNMENT:
        raise ValueError(f"alignment is {alignment}; it must lie in 1..{_MAX_ALIGNMENT}")
    builder = _begin(alignment, [pickle_bytes] if isinstance(pickle_bytes, bytes) else pickle_bytes)
    crcs_before = tuple(builder.crcs)
    for key, nbytes in enumerate(storage_nbytes):
        builder.add_payload(key, nbytes)
    builder.add_literal(b"version", b"3\n")
    id_offset, id_entry = builder.add_literal(b".data/serialization_id", bytes(SERIALIZATION_ID_NBYTES), crc=0)
    directory = builder.finish()
    seal_map = SealMap(
        entry_crc_offsets=[directory + at + 16 for at in builder.payload_entries],
        id_offset=id_offset,
        id_crc_offsets=(id_offset + SERIALIZATION_ID_NBYTES + 4, directory + id_entry + 16),
        crcs_before=crcs_before,
        crcs_after=(builder.crcs[-2],),
        name_hash=name_hash,
    )
    return Container(
        file_bytes=builder.pos,
        literals=tuple(builder.literals),
        payload_offsets=builder.payload_offsets,
        payload_nbytes=builder.payload_nbytes,
        seal_map=seal_map,
        alignment=alignment,
        directory_offset=directory,
    )


def with_pickle(container: Container, pickle_bytes: bytes, storage_nbytes: Sequence[int]) -> Container:
    """`container` with another data.pkl in front of the same storages; cheap where no payload has to move."""
    assert container.seal_map is not None
    first = next((key for key, nbytes in enumerate(storage_nbytes) if nbytes), None)
    builder = _begin(container.alignment, [pickle_bytes])
    if first is not None:
        for key in range(first + 1):
            builder.add_payload(key, storage_nbytes[key])
    if first is None or builder.payload_offsets[0] != container.payload_offsets[0]:
        return lay_out(
            pickle_bytes, storage_nbytes, name_hash=container.seal_map.name_hash, alignment=container.alignment
        )
    tail_offset, tail = container.literals[-1]
    at = container.directory_offset - tail_offset
    # The last entry built is the first payload's: unchanged, so its (then zero) CRC field stays blank.
    entries = b"".join(builder.entries)
    tail = tail[:at] + entries + tail[at + len(entries) :]
    return replace(
        container,
        literals=(builder.literals[0], *container.literals[1:-1], (tail_offset, tail)),
        seal_map=replace(container.seal_map, crcs_before=tuple(builder.crcs)),
    )
