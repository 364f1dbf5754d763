"""Says which record of a damaged file is the bad one: an extent's checksum only says where to look."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..checksum import crc32
from ..errors import CheckpointError
from ..format.zip_records import RecordExtent, UnusualLayoutError, record_extents
from .read_errors import ExtentMismatch
from .reading import BLOCK_BYTES, VerifiedFile


@contextlib.contextmanager
def naming_the_record(file: VerifiedFile) -> Iterator[None]:
    """Let `ExtentMismatch` pass with the record's name added where it can be told. Blocks for the records' bytes, on failure only."""
    try:
        yield
    except ExtentMismatch as mismatch:
        record = _bad_record(file, mismatch)
        if record is None:
            raise
        raise ExtentMismatch(file.name, mismatch.extent, mismatch.first, mismatch.end, record, mismatch.consequence) from mismatch


def _bad_record(file: VerifiedFile, mismatch: ExtentMismatch) -> str | None:
    try:
        records = record_extents(file.unverified, file.size_bytes)
        for name, record in records.items():
            touches = record.offset < mismatch.end and record.offset + record.num_bytes > mismatch.first
            if touches and _crc(file, record) != record.crc32:
                return name
    except (CheckpointError, UnusualLayoutError):
        # The directory is damaged too (or there is none): the byte range has to do.
        return None
    return None


def _crc(file: VerifiedFile, record: RecordExtent) -> int:
    crc = 0
    for offset in range(record.offset, record.offset + record.num_bytes, BLOCK_BYTES):
        crc = crc32(file.unverified(offset, min(BLOCK_BYTES, record.offset + record.num_bytes - offset)), crc)
    return crc
