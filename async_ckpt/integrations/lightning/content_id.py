"""Whether a `.ckpt` file that differs from its manifest is that file, damaged, or another one that somebody put in its
place.

torch writes an id into each file, made of its records' names and CRCs, and the manifest keeps it: a file with the same
id, or with none that can be read, is the committed one and damaged, wherever it was copied to. One with another id was
written by somebody else, and is whole if its own CRCs say so.
"""

from __future__ import annotations

import os
import zipfile

from ...errors import CorruptCheckpointError
from ...format.zip_directory import UnusualLayoutError, read_directory
from ...storage.filesystem import ReadableFile

CONTENT_ID = "content_id"
"""Metadata: torch's id of the committed file."""

_RECORD = ".data/serialization_id"


def read_content_id(file: ReadableFile) -> str | None:
    """torch's id of a file's content; None where it has none, or is cut or laid out in another way. Blocks for three
    reads.
    """

    def pread(offset: int, num_bytes: int) -> bytes:
        memory = bytearray(num_bytes)
        file.pread_into(memoryview(memory), offset)
        return bytes(memory)

    try:
        record = read_directory(pread, file.size_bytes).get(_RECORD)
    except (CorruptCheckpointError, UnusualLayoutError):
        return None
    if record is None or not 0 < record.num_bytes <= 256:
        return None
    return pread(record.offset, record.num_bytes).decode("ascii", "replace")


def check_own_crcs(path: str) -> None:
    """Compare every record of a zip file with the CRC beside it. Blocks for the reading.

    Raises:
        CorruptCheckpointError: one differs, or it is no zip file.
    """
    try:
        with zipfile.ZipFile(os.fspath(path)) as archive:
            bad = archive.testzip()
    # zipfile raises its own, zlib's and struct's errors, and plain ones.
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        OSError,
        ValueError,
        EOFError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise CorruptCheckpointError(f"{path} is no whole torch file: {error}", path=path) from error
    if bad is not None:
        raise CorruptCheckpointError(f"{path} is damaged in record {bad[:200]!a}", path=path, record=bad[:200])
