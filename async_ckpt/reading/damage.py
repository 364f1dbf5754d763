"""Says which records of a damaged file are the bad ones: an extent's checksum only says where to look."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import CheckpointError, CorruptCheckpointError, some_of
from ..format.checksum import crc32
from ..format.zip_directory import UnusualLayoutError, read_directory
from .errors import ExtentMismatch
from .verified_file import BLOCK_BYTES, VerifiedFile

_MAX_SUMMED = 64
_MAX_NAMED = 3


@contextlib.contextmanager
def naming(file: VerifiedFile) -> Iterator[None]:
    """Let errors pass with the file's name added, and `ExtentMismatch` with the record's where it can be told. Blocks
    for the records' bytes, on failure only."""
    try:
        yield
    except ExtentMismatch as mismatch:
        record = damaged_records(file, mismatch.extent)
        if record is None:
            raise
        raise ExtentMismatch(
            file.name, mismatch.extent, mismatch.first, mismatch.end, record, mismatch.consequence
        ) from mismatch
    except CorruptCheckpointError as error:
        if error.path is not None:
            raise
        raise CorruptCheckpointError(f"{file.name}: {error}", path=file.name, record=error.record) from error


def damaged_records(file: VerifiedFile, extent: int) -> str | None:
    """The records that touch an extent, narrowed to those whose own CRC fails; None if unknown. Any thread; blocks for
    their bytes."""
    if file.entry.format == "safetensors":
        return None
    first, end = file.extent_range(extent)
    try:
        records = read_directory(file.unverified, file.size_bytes)
        touching = [
            name for name, record in records.items() if record.offset < end and record.offset + record.num_bytes > first
        ]
        broken = []
        for name in touching[:_MAX_SUMMED]:
            record = records[name]
            if range_crc(file, record.offset, record.num_bytes) != record.crc32:
                broken.append(name)
    except (CheckpointError, UnusualLayoutError):
        # The directory is damaged too (or there is none): the byte range has to do.
        return None
    return some_of(broken or touching, _MAX_NAMED) or None


def range_crc(file: VerifiedFile, offset: int, num_bytes: int) -> int:
    """CRC-32 of `num_bytes` bytes as they are on disk, compared with nothing. Blocks for them."""
    crc = 0
    for done in range(0, num_bytes, BLOCK_BYTES):
        crc = crc32(file.unverified(offset + done, min(BLOCK_BYTES, num_bytes - done)), crc)
    return crc
