"""The header of a safetensors file: a length, and JSON that says where which tensor lies. No torch, no I/O.

A crafted header is an error in time and memory that are linear in its length; every extent lies in the file and
overlaps no other.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import CorruptCheckpointError, UnsupportedStateError
from .metadata import unique_pairs
from .tensors import ITEM_BYTES, TensorExtent
from .zip_directory import PRead, Record

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""
_MAX_DIMS = 4096

_DTYPES = {
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
    "BF16": "bfloat16",
    "C64": "complex64",
    **{f"{short}{bits}": f"{long}{bits}" for short, long in (("U", "uint"), ("I", "int")) for bits in (8, 16, 32, 64)},
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
"""torch's names by the format's."""
_COUNTED = {"F4": 2}
"""How many elements the format counts for one of torch's."""

DTYPE_NAMES = frozenset(_DTYPES.values())
"""torch's names of what the format can hold."""


def read_safetensors(pread: PRead, file_bytes: int, *, name: str) -> list[TensorExtent]:
    """The tensors of file `name`, in the order of its header. Blocks in `pread` (two calls). Raises
    CorruptCheckpointError: the header is malformed. UnsupportedStateError: a dtype that this version does not know."""

    def corrupt(what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{name} is no valid safetensors file: {what}", path=name)

    length = int.from_bytes(pread(0, 8), "little") if file_bytes >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise corrupt(f"header length {length} does not fit the file")
    try:
        header = json.loads(bytes(pread(8, length)), object_pairs_hook=unique_pairs)
        header.pop("__metadata__", None)
        found = [_tensor(key, entry, 8 + length, file_bytes) for key, entry in header.items()]
    except UnsupportedStateError as error:
        raise UnsupportedStateError(f"{name}: {error}; safetensors.torch.load_file may read it") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise corrupt(f"malformed header ({type(error).__name__}: {error})") from error
    end = 8 + length
    for tensor in sorted(found, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset < end:
            raise corrupt("tensors overlap")
        end = tensor.offset + tensor.num_bytes
    return found


def _tensor(key: str, entry: Any, start: int, file_bytes: int) -> TensorExtent:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = _DTYPES.get(entry["dtype"])
    if dtype is None:
        raise UnsupportedStateError(f"tensor {key!r} has dtype {entry['dtype']!r}, which this version does not know")
    if len(shape) > _MAX_DIMS or not all(
        type(number) is int and 0 <= number < 1 << 63 for number in (first, last, *shape)
    ):
        raise ValueError(f"tensor {key!r} has bad numbers")
    counted = _COUNTED.get(entry["dtype"], 1)
    if counted > 1 and shape:
        if shape[-1] % counted:
            raise ValueError(f"tensor {key!r} ends within an element of {dtype}")
        shape = (*shape[:-1], shape[-1] // counted)
    # Steps in memory are 64-bit numbers, also of a tensor without elements.
    steps = [1]
    for number in reversed(shape):
        steps.append(min(steps[-1] * max(number, 1), 1 << 63))
    num_bytes = 0 if 0 in shape else steps[-1] * ITEM_BYTES[dtype]
    if steps[-1] >= 1 << 63 or last - first != num_bytes or start + last > file_bytes:
        raise ValueError(f"tensor {key!r} has a size that does not fit")
    stride = tuple(reversed(steps[: len(shape)]))
    extent = TensorExtent(dtype, shape, stride, start + first, num_bytes, Record(start + first, num_bytes, 0))
    extent.path, extent.key = tuple(key.split(".")), (f"s{key}",)
    return extent
