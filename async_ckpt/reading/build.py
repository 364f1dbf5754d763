"""Reads a file's structure from its pickle or header, with tensors that stay on disk or that a `Scatter` fills.

Guarantees, besides those of `pickles`:
- What it accepts of a pickle (containers, numbers, strings, strided tensors) becomes what `torch.load` would make of
  it; whatever it does not know raises `NotPlainError`, and the caller has torch read the file instead.
- A storage is allocated only after its size was found equal to its record's; all together are smaller than the file.
- No tensor reaches outside its storage.

torch's own restricted unpickler takes 60 us per tensor and tells neither which record a storage comes from nor
its size before it is allocated; a parallel restore needs both.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NoReturn

import torch

from ..errors import CheckpointError, UnsupportedStateError
from ..format.inert import MalformedPickleError, Name, OpaqueKey
from ..format.pickles import TORCH_OPCODES, PickleReader
from ..format.safetensors import read_safetensors
from ..format.tensors import STORAGE_TYPES, StorageRef, TensorExtent, storage_of, tensor_in
from ..format.zip_directory import HeaderCheck, Record, UnusualLayoutError, read_directory
from ..host.memory import collector_paused
from .scatter import Scatter, new_storage
from .verified_file import VerifiedFile

CPU = torch.device("cpu")
DeviceOf = Callable[[str], torch.device]
"""Device for a location tag of the file; raises what `torch.load` would raise if there is no such device."""
Make = Callable[[TensorExtent], Any]

_LEAVES = frozenset({int, float, str, bool, type(None)})
_CALLS = {
    "collections.OrderedDict": Name("OrderedDict"),
    "torch._utils._rebuild_tensor_v2": Name("tensor_v2"),
    "torch._utils._rebuild_tensor_v3": Name("tensor_v3"),
    "torch._utils._rebuild_parameter": Name("parameter"),
    "torch.Size": Name("size"),
    "torch.device": Name("device"),
}
_CALLS |= {
    f"{module}.{kind}": Name(kind)
    for module in ("torch", "torch.storage")
    for kind in STORAGE_TYPES
    if not kind.startswith("Q")
}


class NotPlainError(Exception):
    """The file holds something outside the plain subset, or is laid out otherwise; torch may read it."""


def place_for(map_location: Any) -> DeviceOf | None:
    """How `torch.load` places storages under this `map_location`; None where only torch itself can tell."""
    if isinstance(map_location, (str, torch.device)):
        device = torch.device(map_location)
        return None if device.type == "meta" else (lambda tag: _resolve(str(device)))
    return _resolve if map_location is None else None


def _resolve(tag: str) -> torch.device:
    if tag == "cpu":
        return CPU
    # Only torch knows all tags; it validates the device and moves the (empty) storage there.
    moved = torch.serialization.default_restore_location(torch.UntypedStorage(0), tag)
    return torch.device(moved.device)


class TensorBuilder:
    """Allocates storages and notes in `scatter` how to fill them; tensors of one storage share it."""

    def __init__(self, place: DeviceOf) -> None:
        self.scatter = Scatter()
        self._device_of = cache(place)
        self._dtypes: dict[str, torch.dtype] = {}
        self._storages: dict[tuple[int, int], torch.UntypedStorage] = {}

    def tensor(self, extent: TensorExtent) -> torch.Tensor:
        record = extent.storage
        # An empty one begins where the next one does.
        key = record.offset, record.num_bytes
        untyped = self._storages.get(key)
        if untyped is None:
            untyped = self._storages[key] = new_storage(record.num_bytes, self._device_of(extent.location))
            self.scatter.add(record.offset, record.num_bytes, untyped, fresh=True)
        dtype = self._dtypes.get(extent.dtype)
        if dtype is None:
            dtype = self._dtypes[extent.dtype] = dtype_of(extent)
        tensor: torch.Tensor = torch.empty(0, dtype=dtype, device=untyped.device).set_(
            untyped, extent.storage_offset, extent.shape, extent.stride
        )
        if extent.is_parameter:
            return torch.nn.Parameter(tensor, extent.requires_grad)
        return tensor.requires_grad_() if extent.requires_grad else tensor


def on_disk(extent: TensorExtent) -> Any:
    """The tensor as what it is in the file. Raises NotPlainError where torch lacks its dtype."""
    dtype_of(extent)
    return extent


def read_structure(file: VerifiedFile, make: Make = on_disk) -> Any:
    """What the file holds, its tensors made by `make`; local headers are compared as the rest of it is read. Blocks.
    Raises NotPlainError: only torch can read it. CorruptCheckpointError: malformed. UnsupportedStateError: a
    safetensors file with a dtype that this version or torch does not know."""
    if file.entry.format == "safetensors":
        found = read_safetensors(file.view, file.size_bytes, name=file.name)
        try:
            return {tensor.name: make(tensor) for tensor in found}
        except NotPlainError as error:
            raise UnsupportedStateError(f"{file.name}: {error}") from error
    try:
        records = read_directory(file.read, file.size_bytes)
    except UnusualLayoutError as error:
        raise NotPlainError(str(error)) from error
    if byte_order(file, records) != sys.byteorder.encode():
        _refuse("not this machine's byte order")
    file.show_to(HeaderCheck(records))
    pickled = records.get("data.pkl") or _refuse("no data.pkl")
    return load_plain(file.view(pickled.offset, pickled.num_bytes), records, make)


def byte_order(file: VerifiedFile, records: dict[str, Record]) -> bytes | None:
    """What the file says of its numbers' byte order; None where it says nothing."""
    order = records.get("byteorder")
    return None if order is None else file.read(order.offset, min(order.num_bytes, 16))


def load_plain(pickled: bytes | memoryview, records: Mapping[str, Record], make: Make = on_disk) -> Any:
    """The object that `pickled` describes, its tensors made by `make`. Raises NotPlainError: damaged, or not within
    the plain subset. CorruptCheckpointError: a tensor does not fit its record."""
    reader = _PlainObjects(pickled, records, make)
    if not reader.data.startswith(b"\x80\x02"):
        _refuse("not protocol 2")
    try:
        with collector_paused():
            result = reader.read()
    except CheckpointError:
        raise
    except (MalformedPickleError, RuntimeError) as error:
        # RuntimeError: torch has no such device. The caller's fallback to torch.load says it in torch's words.
        raise NotPlainError(f"malformed at byte {reader.position}: {type(error).__name__}: {error}") from error
    if reader.marks or reader.stack:
        _refuse("stack not empty at the end")
    _refuse_strangers(result)
    return result


def _refuse_strangers(root: Any) -> None:
    # A function or storage must have been consumed by a call; left over in the structure it would be a wrong value.
    seen: set[int] = set()
    todo = [root]
    while todo:
        value = todo.pop()
        kind = type(value)
        if kind in _LEAVES:
            continue
        if kind in (Name, StorageRef, OpaqueKey):
            _refuse("a bare storage or a global is a leaf")
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                # By its class: an attribute of the file's may have a method's name.
                todo.extend(type(value).keys(value))
                todo.extend(type(value).values(value))
                todo.extend(getattr(value, "__dict__", {}).values())
            else:
                todo.extend(value)


class _PlainObjects(PickleReader):
    """Knows plain tensors and what surrounds them."""

    opcodes = TORCH_OPCODES

    def __init__(self, pickled: bytes | memoryview, records: Mapping[str, Record], make: Make) -> None:
        super().__init__(pickled)
        self._records = records
        self._make = make

    def name(self, module: str, attribute: str) -> Any:
        found: Any = _CALLS.get(f"{module}.{attribute}")
        if found is None and module == "torch":
            found = _dtype_named(attribute)
        return found or _refuse(f"global {f'{module}.{attribute}'!r}")

    def persistent(self, value: Any) -> StorageRef:
        return storage_of(value, self._records) or _refuse("unknown persistent id")

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        name = function.text if type(function) is Name else ""
        if name in ("tensor_v2", "tensor_v3"):
            return self._make(self._extent(args, 7 if name == "tensor_v3" else 6))
        if name == "OrderedDict" and args == ():
            return OrderedDict()
        if name == "parameter" and len(args) == 3 and type(args[1]) is bool and not args[2]:
            return _parameter(args[0], args[1])
        if name == "size" and len(args) == 1:
            return torch.Size(args[0])
        if name == "device":
            return torch.device(*args)
        return _refuse(f"call of {name or 'something unknown'}")

    def _extent(self, args: tuple[Any, ...], fixed: int) -> TensorExtent:
        if len(args) < fixed or args[5] or (len(args) > fixed and any(args[fixed:])):
            # Hooks, or metadata such as the conjugate bit.
            _refuse("a tensor with hooks or metadata")
        storage, offset, size, stride, requires_grad = args[:5]
        if type(storage) is not StorageRef or type(requires_grad) is not bool:
            _refuse("bad tensor arguments")
        dtype = str(args[6]).removeprefix("torch.") if fixed == 7 and isinstance(args[6], torch.dtype) else None
        if (fixed == 7) is (dtype is None) or (dtype or "").startswith("q"):
            _refuse("no dtype of plain tensors")
        made = tensor_in(storage, offset, size, stride, dtype, requires_grad) or _refuse("bad tensor geometry")
        return _with_grad(made, True) if requires_grad else made

    def build(self, target: Any, state: Any) -> None:
        # `Module.state_dict()` carries `_metadata` as an attribute of its OrderedDict.
        if type(target) is not OrderedDict or type(state) is not dict or not all(type(name) is str for name in state):
            _refuse("state for something unknown")
        target.__dict__.update(state)

    def extend(self, target: Any, items: list[Any]) -> None:
        _refuse(f"items for a {type(target).__name__}")

    def set_items(self, target: Any, pairs: dict[Any, Any]) -> None:
        _refuse(f"pairs for a {type(target).__name__}")


def _parameter(data: Any, requires_grad: bool) -> Any:
    """An `nn.Parameter` around what has been made of a tensor."""
    if isinstance(data, TensorExtent):
        data.is_parameter = True
        return _with_grad(data, requires_grad)
    return torch.nn.Parameter(data, requires_grad) if isinstance(data, torch.Tensor) else _refuse("no tensor")


def _with_grad(extent: TensorExtent, requires_grad: bool) -> TensorExtent:
    if requires_grad and not (dtype_of(extent).is_floating_point or dtype_of(extent).is_complex):
        _refuse(f"a gradient of {extent.dtype}")
    extent.requires_grad = requires_grad
    return extent


def _refuse(why: str) -> NoReturn:
    raise NotPlainError(why)


def dtype_of(source: TensorExtent | torch.Tensor) -> torch.dtype:
    """torch's dtype of its elements. Raises NotPlainError where this torch has none of that name."""
    if not isinstance(source, TensorExtent):
        return source.dtype
    return _dtype_named(source.dtype) or _refuse(
        f"tensor {source.name!r} is {source.dtype}, which torch {torch.__version__} does not know"
    )


def _dtype_named(name: str) -> torch.dtype | None:
    # Not `getattr`: torch imports hundreds of modules for names that it does not have yet.
    found = vars(torch).get(name)
    return found if isinstance(found, torch.dtype) else None
