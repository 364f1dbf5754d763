"""Reads the pickles of plain state dicts: containers, numbers, strings and strided tensors, and nothing else. No torch.

Guarantees, besides those of `pickles`:
- What it accepts becomes what `torch.load` would make of it; whatever it does not know raises `NotPlainError`,
  and the caller hands the pickle to torch instead.

torch's own restricted unpickler takes 60 us per tensor and tells neither which record a storage comes from nor
its size before it is allocated; a parallel restore needs both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, NoReturn, Protocol

from ..errors import CheckpointError
from ..host.memory import collector_paused
from .opcodes import PROTOCOL_2
from .pickles import MalformedPickleError, Name, OpaqueKey, PickleReader
from .tensors import STORAGE_TYPES, StorageRef, TensorExtent, storage_of, tensor_in
from .zip_directory import Record

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
    """The pickle holds something outside the plain subset; it may still be a valid one."""


class Builder(Protocol):
    """Makes objects out of what the pickle describes; a `CheckpointError` passes, other exceptions become
    `NotPlainError`.
    """

    def tensor(self, extent: TensorExtent) -> Any:
        """A strided tensor."""

    def parameter(self, data: Any, requires_grad: bool) -> Any:
        """An `nn.Parameter` around `data`."""

    def size(self, dims: tuple[int, ...]) -> Any:
        """A `torch.Size`."""

    def device(self, args: tuple[Any, ...]) -> Any:
        """A `torch.device`."""

    def dtype(self, name: str) -> Any:
        """A `torch.dtype` by name, or None if there is no such one."""


def load_plain(pickled: bytes | memoryview, records: Mapping[str, Record], builder: Builder) -> Any:
    """The object that `pickled` describes, its tensors made by `builder`. Any thread; does not block. Raises
    NotPlainError: damaged, or not within the plain subset. CorruptCheckpointError: a tensor does not fit its record."""
    reader = PickleReader(pickled, _PlainObjects(records, builder), PROTOCOL_2)
    if not reader.data.startswith(b"\x80\x02"):
        raise NotPlainError("not protocol 2")
    try:
        with collector_paused():
            result = reader.read()
    except (CheckpointError, NotPlainError):
        raise
    except (MalformedPickleError, RuntimeError) as error:
        # RuntimeError: torch has no such device. The caller's fallback to torch.load says it in torch's words.
        raise NotPlainError(f"malformed at byte {reader.position}: {type(error).__name__}: {error}") from error
    if reader.marks or reader.stack:
        raise NotPlainError("stack not empty at the end")
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
            raise NotPlainError("a bare storage or a global is a leaf")
        if isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                todo.extend(value.keys())
                todo.extend(value.values())
                todo.extend(getattr(value, "__dict__", {}).values())
            else:
                todo.extend(value)


class _PlainObjects:
    """A `pickles.Maker` that knows plain tensors and what surrounds them."""

    def __init__(self, records: Mapping[str, Record], builder: Builder) -> None:
        self._records = records
        self._builder = builder

    def name(self, module: str, attribute: str) -> Any:
        found: Any = _CALLS.get(f"{module}.{attribute}")
        if found is None and module == "torch":
            found = self._builder.dtype(attribute)
        if found is None:
            raise NotPlainError(f"global {f'{module}.{attribute}'!r}")
        return found

    def persistent(self, value: Any) -> StorageRef:
        return storage_of(value, self._records) or _refuse("unknown persistent id")

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        name = function.text if type(function) is Name else ""
        if name in ("tensor_v2", "tensor_v3"):
            return self._builder.tensor(self._extent(args, 7 if name == "tensor_v3" else 6))
        if name == "OrderedDict" and args == ():
            return OrderedDict()
        if name == "parameter" and len(args) == 3 and type(args[1]) is bool and not args[2]:
            return self._builder.parameter(args[0], args[1])
        if name == "size" and len(args) == 1:
            return self._builder.size(args[0])
        if name == "device":
            return self._builder.device(args)
        return _refuse(f"call of {name or 'something unknown'}")

    def _extent(self, args: tuple[Any, ...], fixed: int) -> TensorExtent:
        if len(args) < fixed or args[5] or (len(args) > fixed and any(args[fixed:])):
            # Hooks, or metadata such as the conjugate bit.
            raise NotPlainError("a tensor with hooks or metadata")
        storage, offset, size, stride, requires_grad = args[:5]
        if type(storage) is not StorageRef or type(requires_grad) is not bool:
            raise NotPlainError("bad tensor arguments")
        dtype = str(args[6]).removeprefix("torch.") if fixed == 7 and type(args[6]).__name__ == "dtype" else None
        if (fixed == 7) is (dtype is None) or (dtype or "").startswith("q"):
            raise NotPlainError("no dtype of plain tensors")
        return tensor_in(storage, offset, size, stride, dtype, requires_grad) or _refuse("bad tensor geometry")

    def build(self, target: Any, state: Any) -> None:
        # `Module.state_dict()` carries `_metadata` as an attribute of its OrderedDict.
        if type(target) is not OrderedDict or type(state) is not dict or not all(type(name) is str for name in state):
            raise NotPlainError("state for something unknown")
        target.__dict__.update(state)

    def extend(self, target: Any, items: list[Any]) -> None:
        _refuse(f"items for a {type(target).__name__}")

    def set_items(self, target: Any, pairs: dict[Any, Any]) -> None:
        _refuse(f"pairs for a {type(target).__name__}")


def _refuse(why: str) -> NoReturn:
    raise NotPlainError(why)
