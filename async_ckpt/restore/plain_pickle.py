"""Reads the pickles of plain state dicts: containers, numbers, strings and strided tensors, and nothing else.

Guarantees:
- No global is ever imported and nothing named by the pickle is ever called; a name outside `_CALLS` is refused.
- Time and memory are linear in the pickle's length; nothing recurses.
- What it accepts becomes what `torch.load` would make of it; whatever it does not know raises `NotPlainError`,
  and the caller hands the pickle to torch instead.

torch's own restricted unpickler takes 60 us per tensor and tells neither which record a storage comes from nor
its size before it is allocated; a parallel restore needs both.
"""

from __future__ import annotations

import gc
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import CheckpointError


class NotPlainError(Exception):
    """The pickle holds something outside the plain subset; it may still be a valid one."""


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A storage as the pickle names it: record `data/<key>`, element type, device tag and number of elements."""

    type_name: str
    key: str
    location: str
    num_elements: int


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


class Builder(Protocol):
    """Makes objects out of what the pickle describes; a `CheckpointError` passes, other exceptions become `NotPlainError`."""

    def tensor(
        self, storage: StorageRef, offset: int, size: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool, dtype: Any
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


_CALLS = {
    "collections OrderedDict": _Global("OrderedDict"),
    "torch._utils _rebuild_tensor_v2": _Global("tensor_v2"),
    "torch._utils _rebuild_tensor_v3": _Global("tensor_v3"),
    "torch._utils _rebuild_parameter": _Global("parameter"),
    "torch Size": _Global("size"),
    "torch device": _Global("device"),
}
_uint32 = struct.Struct("<I").unpack_from
_LEAVES = frozenset({int, float, str, bool, type(None)})


def load_plain(pickled: bytes | memoryview, builder: Builder) -> Any:
    """The object that `pickled` describes, its tensors made by `builder`. Any thread; does not block.

    Raises:
        NotPlainError: damaged, or not within the plain subset.
    """
    reader = _Reader(bytes(pickled), builder)
    # Hundreds of thousands of new containers and no garbage: the collector would only walk torch's whole heap in vain.
    collecting = gc.isenabled()
    gc.disable()
    try:
        result = reader.run()
    except CheckpointError:
        raise
    except (LookupError, ArithmeticError, AttributeError, RuntimeError, TypeError, ValueError, struct.error) as error:
        # RuntimeError: torch has no such device. The caller's fallback to torch.load says it in torch's words.
        raise NotPlainError(f"malformed at byte {reader.position}: {type(error).__name__}: {error}") from error
    finally:
        if collecting:
            gc.enable()
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
        if kind is _Global or kind is StorageRef:
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                todo.extend(value.keys())
                todo.extend(value.values())
                todo.extend(getattr(value, "__dict__", {}).values())
            else:
                todo.extend(value)


class _Reader:
    """The stack machine of pickle protocol 2, restricted."""

    def __init__(self, data: bytes, builder: Builder) -> None:
        self.data = data
        self.position = 0
        self.builder = builder
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        # Nine of ten opcodes are these few: spelled out here, because a method call each would double the time.
        data, handlers, memo, stack = self.data, _HANDLERS, self.memo, self.stack
        at = 0
        while True:
            opcode = data[at]
            at += 1
            if opcode == 0x71:  # BINPUT
                memo[data[at]] = stack[-1]
                at += 1
            elif opcode == 0x72:  # LONG_BINPUT
                memo[_uint32(data, at)[0]] = stack[-1]
                at += 4
            elif opcode == 0x68:  # BINGET
                stack.append(memo[data[at]])
                at += 1
            elif opcode == 0x6A:  # LONG_BINGET
                stack.append(memo[_uint32(data, at)[0]])
                at += 4
            elif opcode == 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
            elif opcode == 0x28:  # MARK
                self.marks.append(stack)
                stack = []
            elif opcode == 0x2E:  # STOP
                break
            else:
                handler = handlers[opcode]
                if handler is None:
                    raise NotPlainError(f"opcode {opcode:#04x} at byte {at - 1}")
                self.position, self.stack = at, stack
                handler(self)
                at, stack = self.position, self.stack
        if self.marks or len(stack) != 1:
            raise NotPlainError("stack not empty at the end")
        return stack[0]

    def take(self, num_bytes: int) -> bytes:
        start, end = self.position, self.position + num_bytes
        if num_bytes < 0 or end > len(self.data):
            raise NotPlainError("truncated")
        self.position = end
        return self.data[start:end]

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        text = self.data[self.position : end].decode("ascii")
        self.position = end + 1
        return text

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def proto(self) -> None:
        if self.take(1) != b"\x02":
            raise NotPlainError("not protocol 2")

    def unicode(self) -> None:
        (num_bytes,) = _uint32(self.data, self.position)
        self.position += 4
        self.stack.append(self.take(num_bytes).decode("utf-8", "surrogatepass"))

    def unpacked(self, layout: str, num_bytes: int) -> None:
        self.stack.append(struct.unpack_from(layout, self.data, self.position)[0])
        self.position += num_bytes

    def long1(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.take(1)[0]), "little", signed=True))

    def tuple_mark(self) -> None:
        items = self.pop_mark()
        self.stack.append(tuple(items))

    def tuple_n(self, num_items: int) -> None:
        if len(self.stack) < num_items:
            raise NotPlainError("stack underflow")
        self.stack[-num_items:] = [tuple(self.stack[-num_items:])]

    def set_items(self) -> None:
        items = self.pop_mark()
        target = self._container(dict)
        for i in range(0, len(items), 2):
            key = items[i]
            target[key if type(key) in _LEAVES else _flat_key(key)] = items[i + 1]

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._container(dict)[key if type(key) in _LEAVES else _flat_key(key)] = value

    def append(self) -> None:
        value = self.stack.pop()
        self._container(list).append(value)

    def appends(self) -> None:
        items = self.pop_mark()
        self._container(list).extend(items)

    def _container(self, kind: type) -> Any:
        target = self.stack[-1]
        if not isinstance(target, kind):
            raise NotPlainError(f"items for a {type(target).__name__}")
        return target

    def global_name(self) -> None:
        name = f"{self.line()} {self.line()}"
        found: Any = _CALLS.get(name)
        module, _, attribute = name.partition(" ")
        if found is None and module in ("torch", "torch.storage") and attribute.endswith("Storage"):
            found = _Global(attribute)
        if found is None and module == "torch":
            found = self.builder.dtype(attribute)
        if found is None:
            raise NotPlainError(f"global {name!r}")
        self.stack.append(found)

    def persistent_id(self) -> None:
        tag, kind, key, location, num_elements = self.stack.pop()
        if tag != "storage" or type(kind) is not _Global or type(key) is not str or type(location) is not str:
            raise NotPlainError("unknown persistent id")
        if type(num_elements) is not int or num_elements < 0:
            raise NotPlainError("bad storage size")
        self.stack.append(StorageRef(kind.name, key, location, num_elements))

    def reduce(self) -> None:
        args = self.stack.pop()
        function = self.stack.pop()
        if type(function) is not _Global or type(args) is not tuple:
            raise NotPlainError("call of something unknown")
        self.stack.append(self._call(function.name, args))

    def _call(self, name: str, args: tuple[Any, ...]) -> Any:
        if name in ("tensor_v2", "tensor_v3"):
            fixed = 7 if name == "tensor_v3" else 6
            if len(args) < fixed or any(args[fixed:]) or args[5]:
                # Hooks, or metadata such as the conjugate bit.
                raise NotPlainError("a tensor with hooks or metadata")
            storage, offset, size, stride, requires_grad = args[:5]
            _check_tensor_args(storage, offset, size, stride, requires_grad)
            return self.builder.tensor(storage, offset, size, stride, requires_grad, args[6] if name == "tensor_v3" else None)
        if name == "OrderedDict" and args == ():
            return OrderedDict()
        if name == "parameter" and len(args) == 3 and type(args[1]) is bool and not args[2]:
            return self.builder.parameter(args[0], args[1])
        if name == "size" and len(args) == 1:
            return self.builder.size(args[0])
        if name == "device":
            return self.builder.device(args)
        raise NotPlainError(f"call of {name}")

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        # `Module.state_dict()` carries `_metadata` as an attribute of its OrderedDict.
        if type(target) is not OrderedDict or type(state) is not dict or not all(type(name) is str for name in state):
            raise NotPlainError("state for something unknown")
        target.__dict__.update(state)


def _flat_key(key: Any) -> Any:
    # Hashing a tuple recurses in C without a limit: a deeply nested key would crash the process.
    if type(key) is tuple and all(type(part) in _LEAVES for part in key):
        return key
    raise NotPlainError("a key that is no string, number or tuple of those")


def _check_tensor_args(storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any) -> None:
    good = type(storage) is StorageRef and type(offset) is int and offset >= 0 and type(requires_grad) is bool
    good = good and type(size) is tuple and type(stride) is tuple and len(size) == len(stride)
    if not good or (size and (set(map(type, size + stride)) != {int} or min(size + stride) < 0)):
        raise NotPlainError("bad tensor geometry")


def _handlers() -> list[Callable[[_Reader], None] | None]:
    table: list[Callable[[_Reader], None] | None] = [None] * 256
    for opcode, handler in {
        0x80: _Reader.proto,
        ord("X"): _Reader.unicode,
        ord("M"): lambda r: r.unpacked("<H", 2),
        ord("J"): lambda r: r.unpacked("<i", 4),
        ord("G"): lambda r: r.unpacked(">d", 8),
        0x8A: _Reader.long1,
        ord("t"): _Reader.tuple_mark,
        0x85: lambda r: r.tuple_n(1),
        0x86: lambda r: r.tuple_n(2),
        0x87: lambda r: r.tuple_n(3),
        ord(")"): lambda r: r.stack.append(()),
        ord("}"): lambda r: r.stack.append({}),
        ord("]"): lambda r: r.stack.append([]),
        ord("N"): lambda r: r.stack.append(None),
        0x88: lambda r: r.stack.append(True),
        0x89: lambda r: r.stack.append(False),
        ord("u"): _Reader.set_items,
        ord("s"): _Reader.set_item,
        ord("a"): _Reader.append,
        ord("e"): _Reader.appends,
        ord("c"): _Reader.global_name,
        ord("Q"): _Reader.persistent_id,
        ord("R"): _Reader.reduce,
        ord("b"): _Reader.build,
    }.items():
        table[opcode] = handler
    return table


_HANDLERS = _handlers()
