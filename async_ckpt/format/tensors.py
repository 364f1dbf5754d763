"""Finds the tensors in an inert pickle of torch's: in containers, in objects of any class, in sparse and quantized
tensors.

What rebuilds a tensor is known here by name; everything else stays an object that holds what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import CorruptCheckpointError, UnsupportedStateError
from .inert import Inert, PersistentId, describe, fingerprint
from .pickles import Name, OpaqueKey
from .zip_directory import Record

MAX_TENSORS = 1_000_000
MAX_OTHERS = 100_000
_MAX_DEPTH = 200
_MAX_KEY_PARTS = 64

STORAGE_TYPES = {
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
    "QUInt8Storage": "quint8",
    "QInt8Storage": "qint8",
    "QInt32Storage": "qint32",
    "QUInt4x2Storage": "quint4x2",
    "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "uint8",
}
_BYTES = {
    8: "float64 int64 uint64 complex64",
    4: "float32 int32 uint32 complex32 qint32",
    2: "float16 bfloat16 int16 uint16 bits16",
    1: "int8 uint8 bool qint8 quint8 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu "
    "float4_e2m1fn_x2 bits8 bits1x8 bits2x4 bits4x2 int1 int2 int3 int4 int5 int6 int7 uint1 uint2 uint3 uint4 uint5 "
    "uint6 uint7 quint4x2 quint2x4",
    16: "complex128",
}
ITEM_BYTES = {name: num_bytes for num_bytes, names in _BYTES.items() for name in names.split()}
_ITEMS_PER_BYTE = {"quint4x2": 2, "quint2x4": 4}
_SPARSE_PARTS = {"sparse_coo": ("indices", "values"), "sparse_csr": ("crow_indices", "col_indices", "values")}
_SPARSE_PARTS |= {"sparse_csc": ("ccol_indices", "row_indices", "values"), "sparse_bsr": _SPARSE_PARTS["sparse_csr"]}
_SPARSE_PARTS["sparse_bsc"] = _SPARSE_PARTS["sparse_csc"]


@dataclass(eq=False, slots=True)
class FoundTensor:
    """A strided tensor: where its elements lie, checked against the record."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    extent_bytes: int
    record: str
    extent: Record
    is_conj: bool = False
    is_neg: bool = False
    kind: str = ""
    extra: str = ""
    """A checksum of what belongs to its value besides the elements (a scale, attributes)."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return -(-math.prod(self.shape) * ITEM_BYTES[self.dtype] // _ITEMS_PER_BYTE.get(self.dtype, 1))


class Inventory:
    """A `Call` for `read_inert`: makes `FoundTensor`s of torch's ways to say tensor."""

    def __init__(self, records: Mapping[str, Record]) -> None:
        self._records = records

    def __call__(self, name: str, args: tuple[Any, ...]) -> Any:
        """See `inert.Call`. Raises CorruptCheckpointError where a tensor does not fit its record."""
        if name in ("torch.Size", "torch.device") and len(args) <= 2:
            return Name(f"{name} {_plain_text(args)}")
        if not name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")):
            return None
        what = name.rpartition("._rebuild_")[2]
        if what in ("tensor", "tensor_v2", "tensor_v3") and len(args) >= 4:
            is_v3 = what == "tensor_v3"
            made = self._tensor(args[0], args[1], args[2], args[3], args[6] if is_v3 and len(args) > 6 else None)
            bits = args[7 if is_v3 else 6 :][:1]
            if made is not None and bits and isinstance(bits[0], dict):
                made.is_conj, made.is_neg = (bits[0].get(name) is True for name in ("conj", "neg"))
            return made
        if what in ("parameter", "parameter_with_state") and args:
            if what == "parameter_with_state" and isinstance(args[0], FoundTensor):
                args[0].extra = fingerprint(args[3:])
            return args[0]
        if what == "from_type_v2" and len(args) == 4 and isinstance(args[0], Name) and isinstance(args[2], tuple):
            made = self(args[0].text, args[2])
            data = made if isinstance(made, FoundTensor) else getattr(made, "data", None)
            return Inert(
                describe(args[1]).strip("<>"),
                state=args[3] if made is None or data is made else [args[3], made],
                data=data,
            )
        if what == "qtensor" and len(args) >= 5:
            return Inert(
                "torch.Tensor quantized", state=args[4], data=self._tensor(args[0], args[1], args[2], args[3], None)
            )
        if what in ("sparse_tensor", "sparse_csr_tensor") and len(args) == 2 and isinstance(args[1], tuple):
            return _sparse(args[0], args[1])
        if what == "nested_tensor":
            return _parts("torch.Tensor nested", ("buffer", "sizes", "strides", "storage_offsets"), args)
        if what == "meta_tensor_no_storage" and len(args) >= 2:
            return Name(f"meta tensor {_dtype_of(args[0])} {_plain_text(args[1:2])}")
        return None

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, dtype: Any) -> FoundTensor | None:
        value = storage.value if isinstance(storage, PersistentId) else None
        if not (isinstance(value, tuple) and len(value) >= 5 and value[0] == "storage" and isinstance(value[1], Name)):
            return None
        size = _dims_of(size)
        counted = STORAGE_TYPES.get(value[1].text.rpartition(".")[2])
        actual = counted if dtype is None else _dtype_of(dtype)
        numbers = (
            (offset, value[4], *(size or ()), *stride) if size is not None and isinstance(stride, tuple) else (None,)
        )
        if counted is None or actual not in ITEM_BYTES or len(size or ()) != len(stride):
            return None
        record = f"data/{value[2]}"
        if not all(type(n) is int and 0 <= n < 1 << 63 for n in numbers) or len(stride) > 64:
            raise CorruptCheckpointError(f"a tensor of record {record!r} has impossible numbers", record=record)
        return self._fitting(record, counted, actual, value[4], offset, size or (), stride)

    def _fitting(
        self,
        record: str,
        counted: str,
        actual: str,
        num_elements: int,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> FoundTensor:
        extent = self._records.get(record)
        storage_bytes = num_elements * ITEM_BYTES[counted]
        if extent is None or extent.num_bytes != storage_bytes:
            raise CorruptCheckpointError(
                f"record {record!r} does not have the {storage_bytes} bytes that data.pkl claims", record=record
            )
        item_bytes, per_byte = ITEM_BYTES[actual], _ITEMS_PER_BYTE.get(actual, 1)
        reach = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if -(-(offset + reach) // per_byte) * item_bytes > storage_bytes:
            raise CorruptCheckpointError(f"a tensor reaches outside its record {record!r}", record=record)
        start = extent.offset + offset // per_byte * item_bytes
        return FoundTensor(actual, size, stride, start, -(-reach // per_byte) * item_bytes, record, extent)


def _sparse(layout: Any, parts: tuple[Any, ...]) -> Inert:
    text = str(layout.args[0]) if isinstance(layout, Inert) and layout.args else ""
    name = text.rpartition(".")[2]
    return _parts(f"torch.Tensor {name}", (*_SPARSE_PARTS.get(name, ()), "shape"), parts)


def _parts(name: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Inert:
    return Inert(name, state=dict(zip(names, values, strict=False)))


def _dims_of(size: Any) -> tuple[int, ...] | None:
    if isinstance(size, Inert) and size.args:
        size = size.args[0]
    return size if isinstance(size, tuple) else None


def _dtype_of(dtype: Any) -> str:
    return dtype.text.removeprefix("torch.") if isinstance(dtype, Name) else ""


def _plain_text(args: tuple[Any, ...]) -> str:
    return describe(args[0] if len(args) == 1 else args).strip("'")


@dataclass(frozen=True, slots=True)
class OtherInfo:
    """A value that is no tensor, by key path and in a few words: a plain value as Python writes it, an object as ``<its
    class>``."""

    path: tuple[str, ...]
    text: str
    key: tuple[str, ...] = ()
    """Its key path, whole: no two values have the same."""
    exact: str = ""
    """A checksum of the value, where `text` says less; "data/3" for a bare storage."""

    @property
    def is_object(self) -> bool:
        """Whether it is an object of some class, and no plain value."""
        return self.text.startswith("<")


def leaves(structure: Any) -> Iterator[tuple[tuple[str, ...], tuple[str, ...], FoundTensor | OtherInfo]]:
    """(path to be shown, key path, leaf) in order, without recursion; a container that occurs twice is shown where it
    occurs first."""
    seen: set[int] = set()
    todo: list[tuple[tuple[str, ...], tuple[str, ...], Any]] = [((), (), structure)]
    while todo:
        path, key, value = todo.pop()
        if isinstance(value, FoundTensor):
            yield path, key, value
            continue
        if isinstance(value, Inert):
            if value.data is not None:
                value.data.kind, value.data.extra = value.name, fingerprint(*_own_parts(value))
                yield path, key, value.data
            else:
                yield path, key, OtherInfo(path, describe(value), key, fingerprint(*_own_parts(value)))
        elif isinstance(value, PersistentId):
            record = f"data/{value.value[2]}" if isinstance(value.value, tuple) and len(value.value) > 2 else ""
            yield path, key, OtherInfo(path, "<a bare storage>", key, record)
            continue
        elif not isinstance(value, (dict, list, tuple)):
            exact = fingerprint(value) if isinstance(value, (str, int, bytes)) else ""
            yield path, key, OtherInfo(path, describe(value), key, exact)
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if len(path) > _MAX_DEPTH:
            yield path, key, OtherInfo(path, "<nested too deeply to be shown>", key, fingerprint(value))
            continue
        todo.extend((path + parts, (*key, step), child) for parts, step, child in reversed(list(_children(value))))


_CONTAINERS = (Inert, dict, list, tuple, FoundTensor)


def _own_parts(value: Inert) -> list[Any]:
    """What an object holds apart from its `_children`."""
    if value.name.startswith(("numpy.", "_codecs.")):
        return [value]
    states = value.state if isinstance(value.state, (tuple, list)) else (value.state,)
    return [
        value.name,
        *(type(part).__name__ if isinstance(part, _CONTAINERS) else part for part in (*value.args, *states)),
    ]


def _children(value: Any) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(path parts to be shown, step of the key path, child)."""
    if isinstance(value, dict):
        for number, (key, child) in enumerate(value.items()):
            text = key if isinstance(key, str) else describe(key)
            parts = (
                tuple(text.split("."))
                if 0 < text.count(".") < _MAX_KEY_PARTS and all(text.split("."))
                else (text or "''",)
            )
            yield parts, _step(key, text, number), child
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield (str(index),), f"[{index}]", child
    elif not value.name.startswith(("numpy.", "_codecs.")):
        for index, child in enumerate(value.args):
            if isinstance(child, _CONTAINERS) and child != ():
                yield (f"({index})",), f".({index})", child
        states = value.state if isinstance(value.state, (tuple, list)) else (value.state,)
        for index, state in enumerate(states):
            if isinstance(state, dict):
                yield from ((parts, f".(state {index}) {step}", child) for parts, step, child in _children(state))
            elif isinstance(state, _CONTAINERS):
                yield (f"(state {index})",), f".(state {index})", state
        yield from _children(value.items or ())
        yield from _children(value.pairs or {})


def _step(key: Any, text: str, number: int) -> str:
    """A step that no other key of the dict has; of some keys the text says too little."""
    if isinstance(key, str):
        return f"s{text}"
    is_vague = isinstance(key, (OpaqueKey, tuple, bytes)) or (isinstance(key, int) and key.bit_length() > 256)
    return f"{text}#{number}" if is_vague else text


def too_many(name: str) -> UnsupportedStateError:
    """The error for a file with more tensors than are shown."""
    return UnsupportedStateError(f"{name} has more than {MAX_TENSORS} tensors; --records shows what can be shown")
