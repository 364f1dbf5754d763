"""What is no tensor in a checkpoint of DCP: which of it is plain data, and refusing the rest before anything is made of
it.

DCP's own planner unpickles these blobs and runs their code. Under ``weights_only`` a blob reaches it only if torch's
restricted unpickler takes it, with a few more types that can do no harm: NumPy arrays and scalars, frozen sets, paths,
dates.
"""

from __future__ import annotations

import datetime
import io
import pathlib
import pickle
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any

import numpy
import torch

from ...errors import CorruptCheckpointError
from ...format.zip_directory import UnusualLayoutError, check_headers, read_directory
from ...reading.records import refuse_crafted

_END_MAGIC, _END_BYTES = b"PK\5\6", 22
_MAX_TAIL_BYTES = 1 << 17
_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


def check_container(blob: memoryview, source: str) -> None:
    """Refuse what would need more memory than the blob holds: compressed records, objects made by their length.

    Raises:
        CorruptCheckpointError: it does, or is no container that ``torch.save`` has written.
    """

    def pread(offset: int, num_bytes: int) -> memoryview:
        return blob[offset : offset + num_bytes]

    try:
        records = read_directory(pread, len(blob))
        check_headers(pread, records)
        pickled = records["data.pkl"]
    except (CorruptCheckpointError, UnusualLayoutError, KeyError) as error:
        raise CorruptCheckpointError(f"{source} is no torch container: {error}", path=source) from error
    refuse_crafted(pread(pickled.offset, pickled.num_bytes), source, "data.pkl", records)


def unpadded(blob: memoryview) -> memoryview:
    """A container without the zeros that follow it where it was given room to grow."""
    tail = bytes(blob[-_MAX_TAIL_BYTES:])
    end = tail.rfind(_END_MAGIC) + _END_BYTES
    is_padded = _END_BYTES <= end < len(tail) and not tail[end:].strip(b"\0")
    return blob[: len(blob) - len(tail) + end] if is_padded else blob


def why_not_plain(blob: memoryview, source: str) -> str | None:
    """What keeps a blob from being plain data: its classes by name, or torch's words; None where it is plain.

    Raises:
        CorruptCheckpointError: as `check_container`.
    """
    check_container(blob, source)
    with _more_types():
        try:
            torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            return ", ".join(unknown_types(blob)) or str(error).partition("\n")[0]
        # torch raises whatever the pickle's calls raise.
        except Exception as error:
            raise CorruptCheckpointError(f"{source} cannot be read: {error}", path=source) from error
    return None


def unknown_types(blob: bytes | memoryview) -> list[str]:
    """The names in a torch file that are no plain data, or why torch reads none of it; none in other bytes."""
    if blob[:2] != b"PK":
        return []
    try:
        with _more_types():
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(blob)))
    except pickle.UnpicklingError as error:
        # An int of 256 bytes and more, say.
        return [f"what torch's restricted unpickler does not read ({str(error).partition(chr(10))[0]})"]


def _more_types() -> AbstractContextManager[Any]:
    return torch.serialization.safe_globals(list(_plain_types()))


@lru_cache(maxsize=1)
def _plain_types() -> tuple[Any, ...]:
    # Empty bytes, an empty array's too, are made by a call.
    found: list[Any] = [bytes, frozenset, pathlib.PosixPath, pathlib.PurePosixPath]
    found += [(pathlib.PosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")]
    found += [datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone]
    found += [numpy.ndarray, numpy.dtype, *{type(numpy.dtype(code)) for code in "?bhilqBHILQefdgFDGSUVOMm"}]
    # Where these lie has changed with NumPy 2: files of both are read by both.
    reconstruct, scalar = numpy.empty(0).__reduce__()[0], numpy.float32(0).__reduce__()[0]
    found += [
        (made, f"{module}.{name}")
        for module in _ARRAY_MODULES
        for made, name in ((reconstruct, "_reconstruct"), (scalar, "scalar"))
    ]
    return tuple(found)
