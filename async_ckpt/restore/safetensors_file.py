"""Reads the safetensors format in parallel: a length, a JSON header and the tensors' bytes behind it. No pickle anywhere."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import CorruptCheckpointError, UnsupportedStateError
from .building import Place, place_for
from .reading import VerifiedFile
from .scatter import Scatter, new_storage, stream_into

_MAX_HEADER_BYTES = 100_000_000
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True, slots=True)
class TensorExtent:
    """One tensor of the file: contiguous, `num_bytes` bytes from `offset`."""

    dtype: torch.dtype
    size: tuple[int, ...]
    offset: int
    num_bytes: int


def tensor_extents(file: VerifiedFile) -> dict[str, TensorExtent]:
    """The header, checked: every extent lies in the file, has its tensor's size and overlaps no other.

    Raises:
        CorruptCheckpointError: the header is malformed. UnsupportedStateError: a dtype that this version does not know.
    """
    length = int.from_bytes(file.view(0, 8), "little") if file.size_bytes >= 8 else -1
    if not 2 <= length <= min(_MAX_HEADER_BYTES, file.size_bytes - 8):
        raise _corrupt(file, f"header length {length} does not fit the file")
    try:
        header = json.loads(bytes(file.view(8, length)))
        header.pop("__metadata__", None)
        found = {name: _extent(file, name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, (CorruptCheckpointError, UnsupportedStateError)):
            raise
        raise _corrupt(file, f"malformed header ({type(error).__name__}: {error})") from error
    end = 8 + length
    for extent in sorted(found.values(), key=lambda extent: (extent.offset, extent.num_bytes)):
        if extent.offset < end:
            raise _corrupt(file, "tensors overlap")
        end = extent.offset + extent.num_bytes
    return found


def _extent(file: VerifiedFile, name: str, entry: Any, start: int) -> TensorExtent:
    first, last = entry["data_offsets"]
    size = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (first, last, *size)):
        raise _corrupt(file, f"tensor {name!r} has bad numbers")
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UnsupportedStateError(f"{file.name}: tensor {name!r} has dtype {entry['dtype']!r}; safetensors.torch.load_file may read it")
    if last - first != math.prod(size) * dtype.itemsize or start + last > file.size_bytes:
        raise _corrupt(file, f"tensor {name!r} has a size that does not fit")
    return TensorExtent(dtype, size, start + first, last - first)


def _corrupt(file: VerifiedFile, what: str) -> CorruptCheckpointError:
    return CorruptCheckpointError(f"{file.name} is no valid safetensors file: {what}", path=file.name)


def load_safetensors(file: VerifiedFile, map_location: Any) -> dict[str, torch.Tensor]:
    """All tensors, as `safetensors.torch.load_file` gives them. Blocks.

    Raises:
        UnsupportedStateError: `map_location` is a callable or a mapping (the format has no location tags).
    """
    place: Place | None = place_for(map_location)
    if place is None:
        raise UnsupportedStateError("a safetensors file has no location tags: map_location must be None, a device or its name")
    device = place("cpu")
    scatter = Scatter()
    tensors: dict[str, torch.Tensor] = {}
    for name, extent in tensor_extents(file).items():
        storage = new_storage(extent.num_bytes, device)
        scatter.add(extent.offset, extent.num_bytes, storage)
        tensors[name] = torch.empty(0, dtype=extent.dtype, device=device).set_(storage, 0, extent.size)  # type: ignore[call-overload]
    scatter.freeze()
    stream_into(file, scatter)
    return tensors
