"""The header of a safetensors file: a length, and JSON that says where which tensor lies. No torch, no I/O.

A crafted header is an error in time and memory that are linear in its length; every extent lies in the file and
overlaps no other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptCheckpointError, UnsupportedStateError

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""
_MAX_DIMS = 4096

_DTYPES = {
    "BOOL": ("bool", 1, 1),
    "U8": ("uint8", 1, 1),
    "I8": ("int8", 1, 1),
    "F8_E4M3": ("float8_e4m3fn", 1, 1),
    "F8_E5M2": ("float8_e5m2", 1, 1),
    "F8_E4M3FNUZ": ("float8_e4m3fnuz", 1, 1),
    "F8_E5M2FNUZ": ("float8_e5m2fnuz", 1, 1),
    "F8_E8M0": ("float8_e8m0fnu", 1, 1),
    "F4": ("float4_e2m1fn_x2", 1, 2),
    "U16": ("uint16", 2, 1),
    "I16": ("int16", 2, 1),
    "F16": ("float16", 2, 1),
    "BF16": ("bfloat16", 2, 1),
    "U32": ("uint32", 4, 1),
    "I32": ("int32", 4, 1),
    "F32": ("float32", 4, 1),
    "U64": ("uint64", 8, 1),
    "I64": ("int64", 8, 1),
    "F64": ("float64", 8, 1),
    "C64": ("complex64", 8, 1),
}
"""By the format's name: torch's name, bytes of one torch element, and how many elements the format counts for it."""

DTYPE_NAMES = frozenset(name for name, _, _ in _DTYPES.values())
"""torch's names of what the format can hold."""

PRead = Callable[[int, int], "bytes | memoryview"]
"""`pread(offset, num_bytes)` returns exactly these bytes of the file."""


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """One tensor: contiguous, `num_bytes` bytes from `offset` in the file; dtype and shape are torch's."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    @property
    def stride(self) -> tuple[int, ...]:
        """Steps in elements."""
        steps = [1]
        for num in reversed(self.shape[1:]):
            steps.append(steps[-1] * num)
        return tuple(reversed(steps[: len(self.shape)]))


def read_safetensors(pread: PRead, file_bytes: int, *, name: str) -> list[SafetensorsTensor]:
    """The tensors of file `name`, in the order of its header. Blocks in `pread` (two calls).

    Raises:
        CorruptCheckpointError: the header is malformed. UnsupportedStateError: a dtype that this version does not know.
    """

    def corrupt(what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{name} is no valid safetensors file: {what}", path=name)

    length = int.from_bytes(pread(0, 8), "little") if file_bytes >= 8 else -1
    if not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise corrupt(f"header length {length} does not fit the file")
    try:
        header = json.loads(bytes(pread(8, length)), object_pairs_hook=_unique_pairs)
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


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor(key: str, entry: Any, start: int, file_bytes: int) -> SafetensorsTensor:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in _DTYPES:
        raise UnsupportedStateError(f"tensor {key!r} has dtype {entry['dtype']!r}, which this version does not know")
    dtype, item_bytes, counted = _DTYPES[entry["dtype"]]
    if len(shape) > _MAX_DIMS or not all(
        type(number) is int and 0 <= number < 1 << 63 for number in (first, last, *shape)
    ):
        raise ValueError(f"tensor {key!r} has bad numbers")
    if counted > 1 and shape:
        if shape[-1] % counted:
            raise ValueError(f"tensor {key!r} ends within an element of {dtype}")
        shape = (*shape[:-1], shape[-1] // counted)
    num_elements = 1
    for number in shape:
        # A step in memory is a 64-bit number, also of a tensor without elements.
        num_elements = min(num_elements * max(number, 1), 1 << 63)
    num_bytes = 0 if 0 in shape else num_elements * item_bytes
    if num_elements >= 1 << 63 or last - first != num_bytes or start + last > file_bytes:
        raise ValueError(f"tensor {key!r} has a size that does not fit")
    return SafetensorsTensor(key, dtype, shape, start + first, num_bytes)
