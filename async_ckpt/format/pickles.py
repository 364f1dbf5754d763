"""The one reader of pickles: a stack machine that imports, calls and runs nothing. No torch.

Numbers, text, lists, tuples and dicts are made; what the pickle names or calls is handed to a `Maker`, which says what
stands in its place.

Guarantees:
- Nothing recurses. Time and memory are linear in the pickle's length: what refers to something read before and would
  copy or hash it (an argument, a key) is charged against that length.
- What becomes a dict's key is cheap to hash and to compare; anything else is wrapped in an `OpaqueKey`.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import CheckpointError

MAX_OPCODES = 100_000_000
"""Enough for four million tensors."""
MAX_KEY_DEPTH = 100
"""Hashing a tuple recurses in C."""
_MAX_NAME = 1024
# What references may copy or hash, in items, beyond what the pickle holds once.
_COPIES_PER_BYTE = 4
_FREE_COPIES = 4096
_LEAVES = frozenset({int, float, complex, str, bytes, bool, type(None)})
_SIZED = frozenset({tuple, list, dict, OrderedDict, str, bytes, bytearray})
# Their hashes differ where they differ, or cannot be chosen by whoever has made the pickle.
_CHEAP_KEYS = frozenset({str, bytes, float, bool, type(None)})
_SMALL = 1 << 60
_HASHING_CALLS = frozenset(
    f"{module}.{name}"
    for module, names in (
        ("builtins", "set frozenset dict"),
        ("__builtin__", "set frozenset dict"),
        ("collections", "OrderedDict Counter"),
    )
    for name in names.split()
)
_uint32 = struct.Struct("<I").unpack_from


class MalformedPickleError(Exception):
    """No pickle, or one that is not read: it would take more memory or time than its length accounts for."""


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function, by name only."""

    text: str


@dataclass(eq=False, slots=True)
class OpaqueKey:
    """A key that is not hashed: equal to nothing but itself."""

    value: Any


@dataclass(eq=False, slots=True)
class Placed:
    """A scalar or text, and the bytes of the pickle that say it."""

    value: Any
    start: int
    end: int


def key_value(key: Any) -> Any:
    """What a dict's key stands for."""
    return key.value if type(key) is OpaqueKey else key


class Maker(Protocol):
    """Says what a pickle's names and calls become; a ValueError or its like means that they are malformed."""

    def name(self, module: str, attribute: str) -> Any: ...

    def call(self, function: Any, args: tuple[Any, ...]) -> Any: ...

    def persistent(self, value: Any) -> Any: ...

    def build(self, target: Any, state: Any) -> None: ...

    def extend(self, target: Any, items: list[Any]) -> None:
        """Give `items` to what is no list."""

    def set_items(self, target: Any, pairs: dict[Any, Any]) -> None:
        """Give `pairs` to what is no dict."""


class PickleReader:
    """One pickle being read; `opcodes` is a table of the module of that name."""

    def __init__(self, data: bytes | memoryview, maker: Maker, opcodes: Opcodes) -> None:
        self.data = bytes(data)
        self.position = 0
        self.maker = maker
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._opcodes = opcodes
        self._left = _FREE_COPIES + _COPIES_PER_BYTE * len(self.data)
        self._first_of_hash: dict[int, Any] = {}
        self._num_of_hash: dict[int, int] = {}

    def read(self) -> Any:
        """What the pickle describes. Raises MalformedPickleError."""
        try:
            return self._run()
        except CheckpointError:
            raise
        except (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, struct.error) as error:
            raise MalformedPickleError(f"malformed at byte {self.position}: {type(error).__name__}: {error}") from error

    def _run(self) -> Any:
        # Nine of ten opcodes are these few: spelled out here, because a method call each would double the time.
        data, handlers, memo, stack = self.data, self._opcodes, self.memo, self.stack
        is_plain = handlers[0x4B] is None
        num_bytes, at = len(data), 0
        for _ in range(MAX_OPCODES):
            opcode = data[at]
            at += 1
            if opcode == 0x72:  # LONG_BINPUT
                memo[_uint32(data, at)[0]] = stack[-1]
                at += 4
            elif opcode == 0x68:  # BINGET
                stack.append(memo[data[at]])
                at += 1
            elif opcode == 0x4B and is_plain:  # BININT1
                stack.append(data[at])
                at += 1
            elif opcode == 0x28:  # MARK
                self.marks.append(stack)
                stack = []
            elif opcode == 0x74:  # TUPLE
                items, stack = stack, self.marks.pop()
                stack.append(tuple(items))
            elif opcode == 0x58 and is_plain:  # BINUNICODE
                start = at + 4
                at = start + _uint32(data, at)[0]
                if at > num_bytes:
                    raise ValueError("truncated")
                stack.append(str(data[start:at], "utf-8", "surrogatepass"))
            elif opcode == 0x52:  # REDUCE
                args = stack.pop()
                stack[-1] = self.called(stack[-1], args)
            elif opcode == 0x51:  # BINPERSID
                stack[-1] = self.maker.persistent(stack[-1])
            elif opcode == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif opcode == 0x6A:  # LONG_BINGET
                stack.append(memo[_uint32(data, at)[0]])
                at += 4
            elif opcode == 0x71:  # BINPUT
                memo[data[at]] = stack[-1]
                at += 1
            elif opcode == 0x2E:  # STOP
                self.position, self.stack = at, stack
                return stack.pop()
            else:
                self.position, self.stack = at, stack
                handler = handlers[opcode]
                if handler is None:
                    raise ValueError(f"opcode {opcode:#04x}")
                handler(self)
                at, stack = self.position, self.stack
        raise MalformedPickleError(f"it has more than {MAX_OPCODES} opcodes")

    # What references may cost.

    def charge(self, num_items: int) -> None:
        """Account for `num_items` that are copied, hashed or compared once more."""
        self._left -= num_items
        if self._left < 0:
            raise MalformedPickleError("what it refers to again and again is larger than all it holds")

    def key(self, key: Any) -> Any:
        """`key`, or an `OpaqueKey` where hashing or comparing it could be dear."""
        kind = type(key)
        if kind in _CHEAP_KEYS or (kind is int and -_SMALL < key < _SMALL):
            return key
        is_flat = True
        if isinstance(key, tuple):
            is_flat, is_hashable = self._look_into(key)
            if not is_hashable:
                return OpaqueKey(key)
        elif kind is int:
            self.charge(key.bit_length() >> 6)
        elif kind is not complex:
            return OpaqueKey(key)
        # Numbers and tuples with one hash are easily made, and each would be compared with all before, also by whoever
        # reads the pickle after this.
        value = hash(key)
        if self._first_of_hash.setdefault(value, key) != key:
            self._num_of_hash[value] = self._num_of_hash.get(value, 0) + 1
            self.charge(self._num_of_hash[value])
        return key if is_flat else OpaqueKey(key)

    def _look_into(self, key: tuple[Any, ...]) -> tuple[bool, bool]:
        """Whether it holds only leaves, and whether it can be hashed."""
        is_flat = is_hashable = True
        todo: list[tuple[tuple[Any, ...], int]] = [(key, 1)]
        while todo:
            parts, depth = todo.pop()
            if depth > MAX_KEY_DEPTH:
                raise MalformedPickleError(f"a key is nested deeper than {MAX_KEY_DEPTH}")
            self.charge(len(parts))
            for part in parts:
                if isinstance(part, tuple):
                    todo.append((part, depth + 1))
                elif type(part) is int:
                    self.charge(part.bit_length() >> 6)
                is_flat = is_flat and type(part) in _LEAVES
                is_hashable = is_hashable and not isinstance(part, (list, dict))
        return is_flat, is_hashable

    # Bytes.

    def take(self, num_bytes: int) -> bytes:
        start = self.position
        if num_bytes < 0 or start + num_bytes > len(self.data):
            raise ValueError("truncated")
        self.position = start + num_bytes
        return self.data[start : self.position]

    def sized(self, width: int) -> bytes:
        return self.take(int.from_bytes(self.take(width), "little"))

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self.data.index(b"\n", self.position)
        return str(self.take(end + 1 - self.position)[:-1], "utf-8", "surrogateescape")

    # The stack.

    def unpacked(self, layout: struct.Struct) -> None:
        self.stack.append(layout.unpack_from(self.data, self.position)[0])
        self.position += layout.size

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop(self) -> None:
        # Also what pops a mark: see pickle.py.
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    # Containers and objects.

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        else:
            self.maker.extend(target, items)

    def set_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise ValueError("a key without a value")
        is_dict = isinstance(target, dict)
        pairs = target if is_dict else {}
        for k in range(0, len(items), 2):
            key = items[k]
            pairs[key if type(key) is str else self.key(key)] = items[k + 1]
        if not is_dict:
            self.maker.set_items(target, pairs)

    def new_dict(self) -> None:
        items = self.pop_mark()
        self.push({})
        self.set_items(items)

    def called(self, function: Any, args: Any) -> Any:
        if type(args) is not tuple:
            raise ValueError("arguments that are no tuple")
        if args:
            left = self._left - len(args)
            for arg in args:
                if type(arg) in _SIZED:
                    left -= len(arg)
            self._left = left
            if left < 0:
                self.charge(0)
            if type(function) is Name and function.text in _HASHING_CALLS:
                for arg in args:
                    for item in arg if isinstance(arg, (list, tuple)) else ():
                        self.key(item)
        return self.maker.call(function, args)

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.push(self.called(function, args))

    def from_mark(self) -> None:
        made, *args = self.pop_mark()
        self.push(self.called(made, tuple(args)))

    def instance(self) -> None:
        self.name(self.line(), self.line())
        name = self.stack.pop()
        self.push(self.called(name, tuple(self.pop_mark())))

    def build(self) -> None:
        state = self.stack.pop()
        if type(state) in _SIZED:
            self.charge(len(state))
        self.maker.build(self.stack[-1], state)

    def name(self, module: Any, attribute: Any) -> None:
        if not isinstance(module, str) or not isinstance(attribute, str):
            module, attribute = "", "?"
        if len(module) + len(attribute) > _MAX_NAME:
            raise MalformedPickleError(f"it names something in more than {_MAX_NAME} characters")
        self.push(self.maker.name(module, attribute))


Handler = Callable[[PickleReader], object]
Opcodes = list[Handler | None]
