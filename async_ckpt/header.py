"""What a checkpoint file holds, from its header alone: tensors with key path, shape, dtype and extent. No torch, no code run.

Guarantees:
- Reads the zip directory and `data.pkl`, or the safetensors header; never the tensors.
- A crafted file is an error in bounded time and memory: sizes are checked before they are used, no global named by a
  pickle is imported or called, and every extent lies inside the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from .checksum import crc32
from .errors import CorruptCheckpointError, UnsupportedStateError
from .restore.plain_pickle import NotPlainError, StorageRef, load_plain
from .restore.zip_records import RecordExtent, UnusualLayoutError, record_extents

MAX_PICKLE_BYTES = 256 << 20
MAX_SAFETENSORS_HEADER_BYTES = 100_000_000
_MAX_DEPTH = 200

_STORAGE_TYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "UntypedStorage": "uint8",
}
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
_ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex128": 16,
    "complex64": 8,
    "complex32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
}


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

    @property
    def name(self) -> str:
        """The key path, with dots."""
        return ".".join(self.path)


@dataclass(frozen=True, slots=True)
class FileHeader:
    """One file: its tensors in the order of its structure; `num_others` leaves are no tensors."""

    tensors: tuple[TensorInfo, ...]
    num_others: int
    records: dict[str, RecordExtent]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, shared ones once."""
        return sum(tensor.num_bytes for tensor in self.tensors if not tensor.is_shared)


def read_header(file: HeaderFile, file_format: str, *, name: str) -> FileHeader:
    """The header of an open file of format "torch" or "safetensors". Blocks for a few small reads; any thread.

    Raises:
        CorruptCheckpointError: malformed, or an extent outside the file.
        UnsupportedStateError: a valid file that only torch can read, or an opaque one; says what is in the way.
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
        structure = load_plain(raw, _Inventory(records))
    except NotPlainError as error:
        raise UnsupportedStateError(
            f"{name} is not inspected: its pickle holds more than plain containers and tensors ({error}); "
            "no code was run, --records shows what can be shown"
        ) from error
    tensors, num_others = _collect(structure, name)
    return FileHeader(tensors, num_others, records)


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


@dataclass(frozen=True, slots=True)
class _Name:
    """A value that only torch can make (a dtype, a device, a size), by its name."""

    text: str


@dataclass(eq=False, slots=True)
class _Found:
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    extent_bytes: int
    record: str
    extent: RecordExtent


class _Inventory:
    """A `plain_pickle.Builder` that only writes down what it is told."""

    def __init__(self, records: dict[str, RecordExtent]) -> None:
        self._records = records

    def tensor(
        self, storage: StorageRef, offset: int, size: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool, dtype: Any
    ) -> _Found:
        counted = _STORAGE_TYPES.get(storage.type_name)
        actual = dtype.text if isinstance(dtype, _Name) else counted
        if counted is None or actual not in _ITEM_BYTES:
            raise NotPlainError(f"a tensor of type {actual or storage.type_name!r}")
        item_bytes = _ITEM_BYTES[actual]
        record = f"data/{storage.key}"
        extent = self._records.get(record)
        storage_bytes = storage.num_elements * _ITEM_BYTES[counted]
        if extent is None or extent.num_bytes != storage_bytes:
            raise CorruptCheckpointError(f"record {record!r} does not have the {storage_bytes} bytes that data.pkl claims", record=record)
        reach = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if (offset + reach) * item_bytes > storage_bytes:
            raise CorruptCheckpointError(f"a tensor reaches outside its record {record!r}", record=record)
        return _Found(actual, size, stride, extent.offset + offset * item_bytes, reach * item_bytes, record, extent)

    def parameter(self, data: Any, requires_grad: bool) -> Any:
        if not isinstance(data, _Found):
            raise NotPlainError("a parameter around no tensor")
        return data

    def size(self, dims: tuple[int, ...]) -> Any:
        return _Name(f"torch.Size({dims!r})")

    def device(self, args: tuple[Any, ...]) -> Any:
        return _Name(f"torch.device{args!r}")

    def dtype(self, name: str) -> Any:
        return _Name(name) if name in _ITEM_BYTES else None


def _collect(structure: Any, name: str) -> tuple[tuple[TensorInfo, ...], int]:
    tensors: list[TensorInfo] = []
    seen_bytes: set[tuple[int, int]] = set()
    num_others = 0
    for path, leaf in _leaves(structure, name):
        if not isinstance(leaf, _Found):
            num_others += 1
            continue
        where = (leaf.offset, leaf.extent_bytes)
        num_bytes = math.prod(leaf.shape) * _ITEM_BYTES[leaf.dtype]
        tensors.append(
            TensorInfo(
                path=path,
                dtype=leaf.dtype,
                shape=leaf.shape,
                stride=leaf.stride,
                num_bytes=num_bytes,
                offset=leaf.offset,
                extent_bytes=leaf.extent_bytes,
                record=leaf.record,
                record_crc32=leaf.extent.crc32,
                covers_record=leaf.extent_bytes == leaf.extent.num_bytes,
                is_shared=where in seen_bytes and leaf.extent_bytes > 0,
            )
        )
        seen_bytes.add(where)
    return tuple(tensors), num_others


def _leaves(structure: Any, name: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(key path, leaf) in order, without recursion; a container that occurs twice is shown where it occurs first."""
    seen: set[int] = set()
    todo: list[tuple[tuple[str, ...], Any]] = [((), structure)]
    while todo:
        path, value = todo.pop()
        if not isinstance(value, (dict, list, tuple)):
            yield path, value
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if len(path) > _MAX_DEPTH:
            raise CorruptCheckpointError(f"{name} nests its containers more than {_MAX_DEPTH} deep", path=name, record="data.pkl")
        items = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, child in reversed(items):
            parts = key.split(".") if isinstance(key, str) and key else [repr(key)]
            todo.append((path + tuple(parts), child))


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
    if last - first != math.prod(shape) * _ITEM_BYTES[dtype] or start + last > file_bytes:
        raise ValueError(f"tensor {key!r} has a size that does not fit")
    stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return TensorInfo(tuple(key.split(".")), dtype, shape, stride, last - first, start + first, last - first, "", None, False, False)
