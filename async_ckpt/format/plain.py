"""Reads the pickles of plain state dicts: containers, numbers, strings and strided tensors, and nothing else. No torch.

Guarantees, besides those of `pickles`:
- What it accepts becomes what `torch.load` would make of it; whatever it does not know raises `NotPlainError`,
  and the caller hands the pickle to torch instead.

torch's own restricted unpickler takes 60 us per tensor and tells neither which record a storage comes from nor
its size before it is allocated; a parallel restore needs both.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from ..errors import CheckpointError
from ..host.memory import collector_paused
from .opcodes import PROTOCOL_2
from .pickles import MalformedPickleError, Name, OpaqueKey, PickleReader

_LEAVES = frozenset({int, float, str, bool, type(None)})
_CALLS = {
    "collections.OrderedDict": Name("OrderedDict"),
    "torch._utils._rebuild_tensor_v2": Name("tensor_v2"),
    "torch._utils._rebuild_tensor_v3": Name("tensor_v3"),
    "torch._utils._rebuild_parameter": Name("parameter"),
    "torch.Size": Name("size"),
    "torch.device": Name("device"),
}


class NotPlainError(Exception):
    """The pickle holds something outside the plain subset; it may still be a valid one."""


class StorageRef(NamedTuple):
    """A storage as the pickle names it: record `data/<key>`, element type, device tag and number of elements."""

    type_name: str
    key: str
    location: str
    num_elements: int


class Builder(Protocol):
    """Makes objects out of what the pickle describes; a `CheckpointError` passes, other exceptions become
    `NotPlainError`.
    """

    def tensor(
        self,
        storage: StorageRef,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,
        dtype: Any,
    ) -> Any:
        """A strided tensor; `dtype` is None where the storage's type says it."""

    def parameter(self, data: Any, requires_grad: bool) -> Any:
        """An `nn.Parameter` around `data`."""

    def size(self, dims: tuple[int, ...]) -> Any:
        """A `torch.Size`."""

    def device(self, args: tuple[Any, ...]) -> Any:
        """A `torch.device`."""

    def dtype(self, name: str) -> Any:
        """A `torch.dtype` by name, or None if there is no such one."""


def load_plain(pickled: bytes | memoryview, builder: Builder) -> Any:
    """The object that `pickled` describes, its tensors made by `builder`. Any thread; does not block.

    Raises:
        NotPlainError: damaged, or not within the plain subset.
    """
    reader = PickleReader(pickled, _PlainObjects(builder), PROTOCOL_2)
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
    for _ in _strangers(result):
        raise NotPlainError("a bare storage or a global is a leaf")
    return result


def _strangers(root: Any) -> Iterator[Any]:
    # A function or storage must have been consumed by a call; left over in the structure it would be a wrong value.
    seen: set[int] = set()
    todo = [root]
    while todo:
        value = todo.pop()
        kind = type(value)
        if kind in _LEAVES:
            continue
        if kind in (Name, StorageRef, OpaqueKey):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                todo.extend(value.keys())
                todo.extend(value.values())
                todo.extend(getattr(value, "__dict__", {}).values())
            else:
                todo.extend(value)


class _PlainObjects:
    """A `pickles.Maker` that knows plain tensors and what surrounds them."""

    def __init__(self, builder: Builder) -> None:
        self._builder = builder

    def name(self, module: str, attribute: str) -> Any:
        found: Any = _CALLS.get(f"{module}.{attribute}")
        if found is None and module in ("torch", "torch.storage") and attribute.endswith("Storage"):
            found = Name(attribute)
        if found is None and module == "torch":
            found = self._builder.dtype(attribute)
        if found is None:
            raise NotPlainError(f"global {f'{module}.{attribute}'!r}")
        return found

    def persistent(self, value: Any) -> StorageRef:
        tag, kind, key, location, num_elements = value
        if tag != "storage" or type(kind) is not Name or type(key) is not str or type(location) is not str:
            raise NotPlainError("unknown persistent id")
        if type(num_elements) is not int or num_elements < 0:
            raise NotPlainError("bad storage size")
        return StorageRef(kind.text, key, location, num_elements)

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        name = function.text if type(function) is Name else ""
        if name in ("tensor_v2", "tensor_v3"):
            fixed = 7 if name == "tensor_v3" else 6
            if len(args) < fixed or any(args[fixed:]) or args[5]:
                # Hooks, or metadata such as the conjugate bit.
                raise NotPlainError("a tensor with hooks or metadata")
            storage, offset, size, stride, requires_grad = args[:5]
            _check_tensor_args(storage, offset, size, stride, requires_grad)
            return self._builder.tensor(
                storage, offset, size, stride, requires_grad, args[6] if name == "tensor_v3" else None
            )
        if name == "OrderedDict" and args == ():
            return OrderedDict()
        if name == "parameter" and len(args) == 3 and type(args[1]) is bool and not args[2]:
            return self._builder.parameter(args[0], args[1])
        if name == "size" and len(args) == 1:
            return self._builder.size(args[0])
        if name == "device":
            return self._builder.device(args)
        raise NotPlainError(f"call of {name or 'something unknown'}")

    def build(self, target: Any, state: Any) -> None:
        # `Module.state_dict()` carries `_metadata` as an attribute of its OrderedDict.
        if type(target) is not OrderedDict or type(state) is not dict or not all(type(name) is str for name in state):
            raise NotPlainError("state for something unknown")
        target.__dict__.update(state)

    def extend(self, target: Any, items: list[Any]) -> None:
        raise NotPlainError(f"items for a {type(target).__name__}")

    def set_items(self, target: Any, pairs: dict[Any, Any]) -> None:
        raise NotPlainError(f"pairs for a {type(target).__name__}")


def _check_tensor_args(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any) -> None:
    good = type(storage) is StorageRef and type(offset) is int and offset >= 0 and type(requires_grad) is bool
    good = good and type(size) is tuple and type(stride) is tuple and len(size) == len(stride)
    if not good or (size and (set(map(type, size + stride)) != {int} or min(size + stride) < 0)):
        raise NotPlainError("bad tensor geometry")
