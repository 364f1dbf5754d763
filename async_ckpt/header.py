"""What a checkpoint file holds, from its header alone: tensors with key path, shape, dtype and extent. No torch, no code run.

Guarantees:
- Reads the zip directory and `data.pkl`, or the safetensors header; never the tensors.
- Objects of any class are looked into and never made: no global named by a pickle is imported or called.
- A crafted file is an error in bounded time and memory: sizes are checked before they are used, and every extent lies
  inside the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

from .checksum import crc32
from .errors import CorruptCheckpointError, UnsupportedStateError
from .format.zip_records import RecordExtent, UnusualLayoutError, record_extents
from .inert_pickle import MalformedPickleError, read_inert
from .inventory import ITEM_BYTES, MAX_OTHERS, MAX_TENSORS, FoundTensor, Inventory, OtherInfo, leaves, too_many

MAX_PICKLE_BYTES = 256 << 20
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000

_SAFETENSORS_TYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}

SAFETENSORS_DTYPES = frozenset(_SAFETENSORS_TYPES.values())
"""What a safetensors file can hold."""


class HeaderFile(Protocol):
    """What is needed of an open file."""

    @property
    def size_bytes(self) -> int: ...

    def pread_into(self, buffer: memoryview, offset: int) -> None: ...


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `offset` and `extent_bytes` bound its elements in the file, `num_bytes` is the size of its values."""

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    num_bytes: int
    offset: int
    extent_bytes: int
    record: str
    """The zip record that holds its storage; "" in a safetensors file."""
    record_crc32: int | None
    covers_record: bool
    is_shared: bool
    """An earlier tensor has the same bytes (tied weights, views): totals count them once."""
    kind: str = ""
    """The class of the object around it (a tensor subclass, a quantized tensor); "" for a plain tensor."""
    key: tuple[str, ...] = ()
    """Its key path, whole: two tensors of one file may have the same `name`, none the same key."""
    is_conj: bool = False
    is_neg: bool = False
    """Its values are those of its bytes, conjugated or negated."""
    extra: str = ""
    """A checksum of what belongs to its value besides the elements (a scale, attributes); "" for a plain tensor."""

    @property
    def name(self) -> str:
        """The key path, with dots."""
        return ".".join(self.path)


@dataclass(frozen=True, slots=True)
class FileHeader:
    """One file: its tensors in the order of its structure; `num_others` leaves are no tensors, `others` are the first of them."""

    tensors: tuple[TensorInfo, ...]
    num_others: int
    records: dict[str, RecordExtent]
    others: tuple[OtherInfo, ...] = ()
    rest: str = ""
    """A checksum of the values behind those in `others`."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, shared ones once."""
        return sum(tensor.num_bytes for tensor in self.tensors if not tensor.is_shared)


def read_header(file: HeaderFile, file_format: str, *, name: str) -> FileHeader:
    """The header of an open file of format "torch" or "safetensors". Blocks for a few small reads; any thread.

    Raises:
        CorruptCheckpointError: malformed, or an extent outside the file.
        UnsupportedStateError: more than a million tensors, an opaque file, or a zip file that torch did not write.
    """
    if file_format == "safetensors":
        return _safetensors_header(file, name)
    if file_format != "torch":
        raise UnsupportedStateError(f"{name} has format {file_format!r}: it has no header that could be shown")
    records = read_records(file, name=name)
    pickled = records.get("data.pkl")
    if pickled is None:
        raise CorruptCheckpointError(f"{name} holds no data.pkl: it is no file of torch.save", path=name)
    if pickled.num_bytes > MAX_PICKLE_BYTES:
        raise CorruptCheckpointError(
            f"{name}: data.pkl has {pickled.num_bytes} bytes, at most {MAX_PICKLE_BYTES} are read", path=name, record="data.pkl"
        )
    raw = _read(file, pickled.offset, pickled.num_bytes)
    if crc32(raw) != pickled.crc32:
        raise CorruptCheckpointError(f"{name}: the checksum of data.pkl is wrong", path=name, record="data.pkl")
    try:
        structure = read_inert(bytes(raw), Inventory(records))
    except MalformedPickleError as error:
        raise CorruptCheckpointError(f"{name}: data.pkl cannot be read: {error}", path=name, record="data.pkl") from error
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{name}: {error}", path=name, record=error.record) from error
    return _collect(structure, records, name)


def read_records(file: HeaderFile, *, name: str) -> dict[str, RecordExtent]:
    """The records of a torch file, from the zip directory. Raises CorruptCheckpointError or UnsupportedStateError."""
    try:
        return record_extents(lambda offset, num_bytes: bytes(_read(file, offset, num_bytes)), file.size_bytes)
    except UnusualLayoutError as error:
        raise UnsupportedStateError(f"{name} is no zip file as torch lays it out ({error})") from error
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{name}: {error}", path=name, record=error.record) from error


def _read(file: HeaderFile, offset: int, num_bytes: int) -> memoryview:
    memory = memoryview(bytearray(num_bytes))
    file.pread_into(memory, offset)
    return memory


def _collect(structure: Any, records: dict[str, RecordExtent], name: str) -> FileHeader:
    tensors: list[TensorInfo] = []
    others: list[OtherInfo] = []
    seen_bytes: set[tuple[int, int]] = set()
    num_others = 0
    rest = hashlib.blake2b(digest_size=16)
    for path, key, leaf in leaves(structure):
        if not isinstance(leaf, FoundTensor):
            num_others += 1
            record = records.get(leaf.exact)
            if record is not None:
                leaf = replace(leaf, exact=f"{record.num_bytes} bytes {record.crc32:08x}")
            if len(others) < MAX_OTHERS:
                others.append(leaf)
            else:
                rest.update(repr(leaf).encode("utf-8", "surrogatepass"))
            continue
        if len(tensors) >= MAX_TENSORS:
            raise too_many(name)
        where = (leaf.offset, leaf.extent_bytes)
        tensors.append(
            TensorInfo(
                path=path,
                dtype=leaf.dtype,
                shape=leaf.shape,
                stride=leaf.stride,
                num_bytes=leaf.num_bytes,
                offset=leaf.offset,
                extent_bytes=leaf.extent_bytes,
                record=leaf.record,
                record_crc32=leaf.extent.crc32,
                covers_record=leaf.extent_bytes == leaf.extent.num_bytes,
                is_shared=where in seen_bytes and leaf.extent_bytes > 0,
                kind=leaf.kind,
                key=key,
                is_conj=leaf.is_conj,
                is_neg=leaf.is_neg,
                extra=leaf.extra,
            )
        )
        seen_bytes.add(where)
    return FileHeader(tuple(tensors), num_others, records, tuple(others), rest.hexdigest())


def _safetensors_header(file: HeaderFile, name: str) -> FileHeader:
    def bad(what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(f"{name} is no valid safetensors file: {what}", path=name)

    length = int.from_bytes(_read(file, 0, 8), "little") if file.size_bytes >= 8 else -1
    if not 2 <= length <= min(MAX_SAFETENSORS_HEADER_BYTES, file.size_bytes - 8):
        raise bad(f"header length {length} does not fit the file")
    try:
        header = json.loads(bytes(_read(file, 8, length)))
        header.pop("__metadata__", None)
        tensors = [_safetensors_tensor(key, entry, 8 + length, file.size_bytes) for key, entry in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise bad(f"{type(error).__name__}: {error}") from error
    tensors.sort(key=lambda tensor: tensor.offset)
    end = 8 + length
    for tensor in tensors:
        if tensor.offset < end:
            raise bad("tensors overlap")
        end = tensor.offset + tensor.num_bytes
    return FileHeader(tuple(tensors), 0, {})


def _safetensors_tensor(key: str, entry: Any, start: int, file_bytes: int) -> TensorInfo:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    dtype = _SAFETENSORS_TYPES.get(entry["dtype"])
    if dtype is None:
        raise ValueError(f"tensor {key!r} has the unknown dtype {entry['dtype']!r}")
    if len(shape) > 64 or not all(type(n) is int and 0 <= n < 1 << 63 for n in (first, last, *shape)):
        raise ValueError(f"tensor {key!r} has bad numbers")
    if last - first != math.prod(shape) * ITEM_BYTES[dtype] or start + last > file_bytes:
        raise ValueError(f"tensor {key!r} has a size that does not fit")
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    path = tuple(key.split("."))
    return TensorInfo(path, dtype, shape, stride, last - first, start + first, last - first, "", None, False, False, key=("s" + key,))
