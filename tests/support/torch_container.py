"""The container by torch itself: what `torch.save` writes around the holes that it leaves for storages."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import serialization as torch_serialization

from async_ckpt.errors import CorruptCheckpointError
from async_ckpt.format.zip import Container, SealMap
from async_ckpt.format.zip_directory import read_directory

_DATA_PREFIX = "data/"
_ID_NAME = ".data/serialization_id"
_ID_NBYTES = 40


class HoleFile:
    """The file object torch.save writes to: keeps literals, skips holes."""

    def __init__(self) -> None:
        self.position = 0
        self.runs: list[tuple[int, list[bytes]]] = [(0, [])]

    def write(self, data: memoryview) -> int:
        # The view is valid during this call only.
        self.runs[-1][1].append(bytes(data))
        self.position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_CUR or offset < 0:
            raise OSError(f"unexpected seek({offset}, {whence}) while recording a layout")
        self.position += offset
        self.runs.append((self.position, []))
        return self.position

    def flush(self) -> None:
        """Nothing to do: torch calls it at the end."""

    def literals(self) -> tuple[tuple[int, bytes], ...]:
        return tuple((offset, b"".join(parts)) for offset, parts in self.runs)


def torch_container(obj: Any, *, alignment: int = 64) -> Container:
    """What torch.save makes of `obj`."""
    config: Any = torch_serialization.config
    file = HoleFile()
    with config.patch({"save.storage_alignment": alignment}), torch.serialization.skip_data():
        torch.save(obj, file)  # type: ignore[arg-type]
    return scan(file.literals(), file.position, alignment)


def scan(literals: Sequence[tuple[int, bytes]], file_bytes: int, alignment: int) -> Container:
    """Read torch's own layout back from the literal bytes it wrote around the holes; blanks what depends on payload
    CRCs.

    `literals`: ascending runs, merged so that each lies between two holes. Raises CorruptCheckpointError where they are
    no container.
    """
    starts = [offset for offset, _ in literals]

    def pread(offset: int, nbytes: int) -> bytes:
        start, data = literals[bisect_right(starts, offset) - 1]
        return data[offset - start : offset - start + nbytes]

    records = read_directory(pread, file_bytes)
    payloads = [record for name, record in records.items() if name.startswith(_DATA_PREFIX) and record.num_bytes]
    first = payloads[0].offset if payloads else file_bytes
    last, id_record = list(records.items())[-1]
    if last != _ID_NAME or id_record.num_bytes != _ID_NBYTES:
        raise CorruptCheckpointError("the last record is not the serialization id", record=last)
    others = [record for name, record in records.items() if name != last and not name.startswith(_DATA_PREFIX)]
    plain = [record for record in others if record.num_bytes]
    id_crc_offsets = (id_record.offset + _ID_NBYTES + 4, id_record.entry_offset + 16)
    name_hash = pread(id_record.offset, 20)
    tail_offset, tail = literals[-1]
    blank = bytearray(tail)
    for offset, nbytes in ((id_record.offset, _ID_NBYTES), (id_crc_offsets[0], 4), (id_crc_offsets[1], 4)):
        blank[offset - tail_offset : offset - tail_offset + nbytes] = bytes(nbytes)
    version = records["version"].offset
    return Container(
        file_bytes=file_bytes,
        literals=(*literals[:-1], (tail_offset, bytes(blank))),
        payload_offsets=[record.offset for record in payloads],
        payload_nbytes=[record.num_bytes for record in payloads],
        seal_map=SealMap(
            entry_crc_offsets=[record.entry_offset + 16 for record in payloads],
            id_offset=id_record.offset,
            id_crc_offsets=id_crc_offsets,
            crcs_before=tuple(record.crc32 for record in plain if record.offset < first and record.offset < version),
            crcs_after=tuple(record.crc32 for record in plain if record.offset >= version),
            name_hash=name_hash,
        ),
        alignment=alignment,
        directory_offset=next(iter(records.values())).entry_offset,
    )
