"""Finds the tensors in an inert pickle of torch's: in containers, in objects of any class, in sparse and quantized
tensors.

What rebuilds a tensor is known here by name; everything else stays an object that holds what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ..errors import CorruptCheckpointError
from .inert import Fingerprint, Inert, MalformedPickleError, Name, OpaqueKey, PersistentId, describe
from .names import shown
from .pickles import Contents
from .zip_directory import Record

MAX_TENSORS = 1_000_000
MAX_OTHERS = 100_000
_MAX_NUMBER = 1 << 63
_MAX_DEPTH = 100
_MAX_KEY_PARTS = 64
# What the key paths of all leaves may take together: their characters, and so much for each of their parts.
_FREE_PATHS, _PATHS_PER_BYTE, _PART_BYTES = 64 << 20, 16, 16
_Place = tuple[tuple[str, ...], tuple[str, ...], Any]
"""What is shown as a key path, the key path as it is, and the value there."""

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
class TensorExtent:
    """One strided tensor in a file: which of its bytes are the elements, and in which order. Geometry in elements."""

    dtype: str
    """The dtype's name in torch."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    """File offset of the first element."""
    extent_bytes: int
    """The bytes from there to the end of the last element."""
    storage: Record
    storage_offset: int = 0
    location: str = "cpu"
    """The tag of the device that it was saved from."""
    requires_grad: bool = False
    is_parameter: bool = False
    is_conj: bool = False
    is_neg: bool = False
    """Its values are those of its bytes, conjugated or negated."""
    kind: str = ""
    """The class of the object around it (a tensor subclass, a quantized tensor); "" for a plain tensor."""
    extra: str = ""
    """A checksum of what belongs to its value besides the elements (a scale, attributes)."""
    path: tuple[str, ...] = ()
    key: tuple[str, ...] = ()
    """Its key path, whole: two tensors of one file may have the same `name`, none the same key."""
    is_shared: bool = False
    """An earlier tensor has the same bytes (tied weights, views): totals count them once."""

    @property
    def name(self) -> str:
        """The key path, with dots."""
        return ".".join(self.path)

    @property
    def num_bytes(self) -> int:
        """Bytes of its values."""
        return -(-math.prod(self.shape) * ITEM_BYTES[self.dtype] // _ITEMS_PER_BYTE.get(self.dtype, 1))

    @property
    def record(self) -> str:
        """The zip record of its storage; "" in a safetensors file, where each is its own."""
        return self.storage.name


class StorageRef(NamedTuple):
    """A storage as a pickle names it: its record, what its elements are, and the device tag."""

    record: Record
    dtype: str
    location: str


def storage_of(persistent_id: Any, records: Mapping[str, Record]) -> StorageRef | None:
    """The storage that torch's persistent id names, or None where it is no such id. Raises CorruptCheckpointError:
    there is no such record, or it is longer or shorter than the storage."""
    if not isinstance(persistent_id, tuple) or len(persistent_id) != 5:
        return None
    tag, kind, key, location, num_elements = persistent_id
    name = kind.text if type(kind) is Name else ""
    dtype = STORAGE_TYPES.get(name) or STORAGE_TYPES.get(name.rpartition(".")[2])
    if tag != "storage" or dtype is None or not type(key) is type(location) is str:
        return None
    record = records.get(f"data/{key}")
    num_bytes = num_elements * ITEM_BYTES[dtype] if type(num_elements) is int else -1
    if record is None or record.num_bytes != num_bytes:
        held = "is missing" if record is None else f"holds {record.num_bytes} bytes"
        name = shown(f"data/{key}")
        raise CorruptCheckpointError(
            f"data.pkl needs {num_bytes} bytes of record {name}, which {held}", record=name[1:-1]
        )
    return StorageRef(record, dtype, location)


def tensor_in(
    storage: StorageRef, offset: Any, size: Any, stride: Any, dtype: str | None = None, requires_grad: bool = False
) -> TensorExtent | None:
    """A tensor of a storage's elements, or of `dtype`; None where these are no numbers that torch writes. Raises
    CorruptCheckpointError: it reaches outside its storage."""
    record, actual = storage.record, dtype or storage.dtype
    item_bytes, per_byte = ITEM_BYTES.get(actual), _ITEMS_PER_BYTE.get(actual, 1)
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride) or item_bytes is None:
        return None
    if type(offset) is not int:
        return None
    reach, is_sound = 1, 0 <= offset < _MAX_NUMBER
    for num, step in zip(size, stride, strict=True):
        if type(num) is not int or type(step) is not int:
            return None
        is_sound = is_sound and 0 <= num < _MAX_NUMBER and 0 <= step < _MAX_NUMBER
        # Of impossible numbers, which may be as long as the pickle, no product is taken.
        reach += (num - 1) * step if is_sound else 0
    if not is_sound:
        raise CorruptCheckpointError(f"a tensor of record {record.name!a} has impossible numbers", record=record.name)
    if 0 in size:
        return TensorExtent(actual, size, stride, record.offset, 0, record, offset, storage.location, requires_grad)
    if -(-(offset + reach) // per_byte) * item_bytes > record.num_bytes:
        raise CorruptCheckpointError(f"a tensor reaches outside its record {record.name!a}", record=record.name)
    start = record.offset + offset // per_byte * item_bytes
    extent_bytes = -(-reach // per_byte) * item_bytes
    return TensorExtent(actual, size, stride, start, extent_bytes, record, offset, storage.location, requires_grad)


class Inventory(Contents):
    """Inert notes, with a `TensorExtent` for each of torch's ways to say tensor."""

    def __init__(self, pickled: bytes, records: Mapping[str, Record]) -> None:
        super().__init__(pickled)
        self._records = records
        self.fingerprint = Fingerprint(len(pickled))

    def known(self, name: str, args: tuple[Any, ...]) -> Any:
        """See `Contents`. Raises CorruptCheckpointError where a tensor does not fit its record."""
        if name in ("torch.Size", "torch.device") and len(args) <= 2:
            return Name(f"{name} {_plain_text(args)}")
        if not name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_")):
            return super().known(name, args)
        what = name.rpartition("._rebuild_")[2]
        if what in ("tensor", "tensor_v2", "tensor_v3") and len(args) >= 4:
            is_v3 = what == "tensor_v3"
            made = self._tensor(args[:4], args[6] if is_v3 and len(args) > 6 else None)
            bits = args[7 if is_v3 else 6 :][:1]
            if made is not None and bits and isinstance(bits[0], dict):
                made.is_conj, made.is_neg = (bits[0].get(name) is True for name in ("conj", "neg"))
            return made
        if what in ("parameter", "parameter_with_state") and args:
            if what == "parameter_with_state" and isinstance(args[0], TensorExtent):
                args[0].extra = self.fingerprint(args[3:])
            return args[0]
        if what == "from_type_v2" and len(args) == 4 and isinstance(args[0], Name) and isinstance(args[2], tuple):
            # torch nests it once.
            made = None if args[0].text.endswith("from_type_v2") else self.known(args[0].text, args[2])
            data = made if isinstance(made, TensorExtent) else getattr(made, "data", None)
            state = args[3] if made is None or data is made else [args[3], made]
            return Inert(describe(args[1]).strip("<>"), state=state, data=data)
        if what == "qtensor" and len(args) >= 5:
            return Inert("torch.Tensor quantized", state=args[4], data=self._tensor(args[:4], None))
        if what in ("sparse_tensor", "sparse_csr_tensor") and len(args) == 2 and isinstance(args[1], tuple):
            layout = args[0].args[0] if isinstance(args[0], Inert) and args[0].args else ""
            kind = layout.rpartition(".")[2] if isinstance(layout, str) else ""
            return _parts(f"torch.Tensor {kind}", (*_SPARSE_PARTS.get(kind, ()), "shape"), args[1])
        if what == "nested_tensor":
            return _parts("torch.Tensor nested", ("buffer", "sizes", "strides", "storage_offsets"), args)
        if what == "meta_tensor_no_storage" and len(args) >= 2:
            return Name(f"meta tensor {_dtype_of(args[0])} {_plain_text(args[1:2])}")
        return None

    def _tensor(self, args: tuple[Any, ...], dtype: Any) -> TensorExtent | None:
        storage, offset, size, stride = args
        found = storage_of(storage.value, self._records) if isinstance(storage, PersistentId) else None
        size = size.args[0] if isinstance(size, Inert) and size.args else size
        return found and tensor_in(found, offset, size, stride, None if dtype is None else _dtype_of(dtype) or "?")


def _parts(name: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Inert:
    return Inert(name, state=dict(zip(names, values, strict=False)))


def _dtype_of(dtype: Any) -> str:
    return dtype.text.removeprefix("torch.") if isinstance(dtype, Name) else ""


def _plain_text(args: tuple[Any, ...]) -> str:
    return describe(args[0] if len(args) == 1 else args).strip("'")


@dataclass(frozen=True, slots=True)
class OtherInfo:
    """A value that is no tensor, in a few words: a plain one as Python writes it, an object as ``<its class>``."""

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


def leaves(pickled: bytes, records: Mapping[str, Record]) -> Iterator[TensorExtent | OtherInfo]:
    """What the structure holds, in order; a container that occurs twice is shown where it occurs first. Raises
    MalformedPickleError. CorruptCheckpointError: a tensor does not fit its record."""
    inventory = Inventory(pickled, records)
    structure, fingerprint = inventory.read(), inventory.fingerprint
    seen: set[int] = set()
    left = _FREE_PATHS + _PATHS_PER_BYTE * len(pickled)
    todo: list[Iterator[_Place]] = [iter([((), (), structure)])]
    while todo:
        place = next(todo[-1], None)
        if place is None:
            todo.pop()
            continue
        path, key, value = place
        left -= sum(map(len, path)) + _PART_BYTES * len(path)
        if left < 0:
            raise MalformedPickleError("the key paths of what it holds are far longer than all it holds")
        data = value.data if isinstance(value, Inert) else value
        if isinstance(data, TensorExtent):
            around = {} if value is data else {"kind": value.name, "extra": fingerprint(*_own_parts(value))}
            yield replace(data, path=path, key=key, **around)
        elif isinstance(value, Inert):
            yield OtherInfo(path, describe(value), key, fingerprint(*_own_parts(value)))
        elif isinstance(value, PersistentId):
            name = value.value[2] if isinstance(value.value, tuple) and len(value.value) > 2 else ""
            yield OtherInfo(path, "<a bare storage>", key, f"data/{name}" if isinstance(name, str) else "")
        elif not isinstance(value, (dict, list, tuple)):
            exact = fingerprint(value) if isinstance(value, (str, int, bytes)) else ""
            yield OtherInfo(path, describe(value), key, exact)
        if id(value) in seen or not isinstance(value, (Inert, dict, list, tuple)):
            continue
        seen.add(id(value))
        if len(path) > _MAX_DEPTH:
            yield OtherInfo(path, "<nested too deeply to be shown>", key, fingerprint(value))
            continue
        todo.append(_below(path, key, value))


def _below(path: tuple[str, ...], key: tuple[str, ...], value: Any) -> Iterator[_Place]:
    return ((path + parts, (*key, step), child) for parts, step, child in _children(value))


_CONTAINERS = (Inert, dict, list, tuple, TensorExtent)


def _own_parts(value: Inert) -> list[Any]:
    """What an object holds apart from its `_children`."""
    if value.name.startswith(("numpy.", "_codecs.")):
        return [value]
    parts = (*value.args, *value.states)
    return [value.name, *(type(part).__name__ if isinstance(part, _CONTAINERS) else part for part in parts)]


def _children(value: Any) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(path parts to be shown, step of the key path, child)."""
    if isinstance(value, dict):
        for number, (key, child) in enumerate(value.items()):
            text = key if isinstance(key, str) else describe(key)
            is_path = 0 < text.count(".") < _MAX_KEY_PARTS and all(text.split("."))
            yield tuple(text.split(".")) if is_path else (text or "''",), _step(key, text, number), child
    elif isinstance(value, (list, tuple)):
        for index, child in enumerate(value):
            yield (str(index),), f"[{index}]", child
    elif not value.name.startswith(("numpy.", "_codecs.")):
        for index, child in enumerate(value.args):
            if isinstance(child, _CONTAINERS) and child != ():
                yield (f"({index})",), f".({index})", child
        for index, state in enumerate(value.states):
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
