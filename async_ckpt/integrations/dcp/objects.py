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
from ...format.zip_directory import END, END64, LOCATOR, UnusualLayoutError, check_headers, read_directory
from ...reading.build import NotPlainError
from ...reading.records import refuse_crafted

_END_MAGIC = b"PK\5\6"
_STEP_BYTES = 1 << 17
_ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")


def check_container(blob: memoryview, source: str) -> None:
    """Raise CorruptCheckpointError for what needs more memory than the blob holds (compressed records, objects made by
    their length) or is no container that ``torch.save`` has written.
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


def padded(blob: bytes, num_bytes: int) -> bytes:
    """A container of `num_bytes`, or as long as it is. The zeros lie before what readers look for at the end: torch
    finds it only under a few of them.
    """
    cut = len(blob) - LOCATOR.size - END.size
    return blob[:cut] + bytes(max(0, num_bytes - len(blob))) + blob[cut:]


def unpadded(blob: memoryview) -> memoryview:
    """A container without the zeros in it, or behind it, where it was given room to grow."""
    behind = len(blob)
    while behind > _STEP_BYTES and not bytes(blob[behind - _STEP_BYTES : behind]).strip(b"\0"):
        behind -= _STEP_BYTES
    # The first bytes of what ends a container may lie before the step that its last ones are in.
    start = max(0, behind - _STEP_BYTES - END.size)
    tail = bytes(blob[start : behind + END.size])
    end = tail.rfind(_END_MAGIC) + END.size
    if END.size <= end <= len(tail) and not tail[end:].strip(b"\0"):
        blob = blob[: start + end]
    cut = len(blob) - LOCATOR.size - END.size
    if cut < 0:
        return blob
    magic, _, end64, _ = LOCATOR.unpack_from(blob, cut)
    whole = end64 + END64.size
    if magic != b"PK\6\7" or whole >= cut or bytes(blob[whole:cut]).strip(b"\0"):
        return blob
    return memoryview(b"".join((blob[:whole], blob[cut:])))


def load_blob(blob: memoryview, source: str, *, weights_only: bool = True) -> Any:
    """What `torch.load` makes of a blob. Raises CorruptCheckpointError: it cannot, or with `weights_only` as
    `check_container`; NotPlainError then: there is more than plain data, classes by name, or torch's words.
    """
    if weights_only:
        check_container(blob, source)
    try:
        with _more_types(), torch.sparse.check_sparse_tensor_invariants():
            return torch.load(io.BytesIO(blob), map_location="cpu", weights_only=weights_only)
    # torch raises whatever its unpickler, its zip reader and the pickle's calls raise.
    except Exception as error:
        if weights_only and isinstance(error, pickle.UnpicklingError):
            raise NotPlainError(", ".join(unknown_types(blob)) or str(error).partition("\n")[0]) from error
        raise CorruptCheckpointError(f"{source} cannot be read: {error}", path=source) from error


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
