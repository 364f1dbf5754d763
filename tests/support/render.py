"""Assemble a planned file in memory, extent by extent, the way the engine does."""

from __future__ import annotations

import ctypes

from async_ckpt.format.checksum import crc32
from async_ckpt.plan.plan import PlannedState
from async_ckpt.plan.strided import row_major_bytes


def storage_bytes(storage, offset_bytes: int, nbytes: int) -> bytes:
    """Bytes of a CPU storage."""
    return ctypes.string_at(storage.data_ptr() + offset_bytes, nbytes)


def unsealed(planned: PlannedState) -> bytearray:
    """Literals and payloads in place, payload CRCs still zero. Fails where they do not tile the file."""
    plan = planned.plan
    assert len(planned.storages) == len(planned.starts) == len(plan.payload_offsets) == len(plan.payload_nbytes)
    pieces = [(offset, data) for offset, data in plan.literals if data]
    payloads = zip(plan.payload_offsets, plan.payload_nbytes, planned.storages, planned.starts, strict=True)
    for payload, (offset, nbytes, storage, start) in enumerate(payloads):
        assert nbytes > 0
        if payload in plan.strided:
            memory = plan.strided[payload].memory(storage, start)
            pieces.append((offset, row_major_bytes(memory, 0, nbytes).numpy().tobytes()))
        else:
            pieces.append((offset, storage_bytes(storage, start, nbytes)))
    image = bytearray()
    for offset, data in sorted(pieces, key=lambda piece: piece[0]):
        assert offset == len(image)
        image += data
    assert len(image) == plan.file_bytes
    return image


def render(planned: PlannedState, extent_nbytes: int = 4096) -> bytes:
    """The finished file, sealed in extents of `extent_nbytes`; checks the CRC of every extent."""
    image = unsealed(planned)
    sealer = planned.plan.sealer()
    view = memoryview(image)
    for offset in range(0, len(image), extent_nbytes):
        extent = view[offset : offset + extent_nbytes]
        crc = sealer(offset, extent)
        assert crc == crc32(bytes(extent)), f"extent at {offset}"
    return bytes(image)
