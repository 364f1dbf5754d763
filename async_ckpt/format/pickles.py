"""The one reader of pickles: a stack machine that imports, calls and runs nothing. No torch.

Numbers, text, lists, tuples and dicts are made; what the pickle would import or call becomes an inert note of the name
and the arguments, or what a subclass puts in its place.

Guarantees:
- Nothing recurses. Time and memory are linear in the pickle's length: what refers to something read before and would
  copy or hash it (an argument, a key) is charged against that length.
- What becomes a dict's key is cheap to hash and to compare; anything else is wrapped in an `OpaqueKey`.
"""

from __future__ import annotations

import codecs
import io
import pickletools
import struct
from collections import OrderedDict
from collections.abc import Callable, Container, Sequence
from typing import Any

from ..errors import CheckpointError
from .inert import BUILTINS, MalformedPickleError, Name, Notes, OpaqueKey, Placed

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
_HASHING_CALLS = frozenset(f"{module}.{kind}" for module in BUILTINS for kind in ("set", "frozenset", "dict"))
_HASHING_CALLS |= {"collections.OrderedDict", "collections.Counter"}
_uint16 = struct.Struct("<H").unpack_from
_uint32 = struct.Struct("<I").unpack_from

TORCH_OPCODES = frozenset(b"NKMJGX\x88\x89\x8a\x8b\x80\x86\x87)}]usaec\x81b")
"""What torch's own files are made of, besides what `_run` reads itself."""


class PickleReader(Notes):
    """One pickle being read.

    Args:
        places: whether numbers, None, booleans and text become `Placed`. Then only `TORCH_OPCODES` are read: what is
            thrown away again stands in two places.
    """

    opcodes: Container[int] = range(256)
    """What is read; anything else is malformed."""

    def __init__(self, data: bytes | memoryview, *, places: bool = False) -> None:
        super().__init__()
        self.data = bytes(data)
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._stream = io.BytesIO(self.data)
        self._places = places
        if places:
            self.opcodes = TORCH_OPCODES
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
        data, memo, stack, is_plain = self.data, self.memo, self.stack, not self._places
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
                stack[-1] = self._called(stack[-1], args)
            elif opcode == 0x51:  # BINPERSID
                stack[-1] = self.persistent(stack[-1])
            elif opcode == 0x4D and is_plain:  # BININT2
                stack.append(_uint16(data, at)[0])
                at += 2
            elif opcode == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif opcode == 0x86:  # TUPLE2
                last = stack.pop()
                stack[-1] = (stack[-1], last)
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
                self._step(opcode)
                at, stack = self.position, self.stack
        raise MalformedPickleError(f"it has more than {MAX_OPCODES} opcodes")

    def _step(self, opcode: int) -> None:
        start = self.position - 1
        if opcode in _LITERALS and opcode in self.opcodes:
            value = self._argument(opcode)
            self.stack.append(Placed(value, start, self.position) if self._places else value)
        elif opcode in _HANDLERS and opcode in self.opcodes:
            _HANDLERS[opcode](self)
        else:
            raise ValueError(f"opcode {opcode:#04x}")

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
        if not isinstance(key, tuple) and kind is not int and kind is not complex:
            return OpaqueKey(key)
        todo: list[tuple[Any, int]] = [(key, 1)]
        while todo:
            part, depth = todo.pop()
            if isinstance(part, tuple):
                if depth > MAX_KEY_DEPTH:
                    raise MalformedPickleError(f"a key is nested deeper than {MAX_KEY_DEPTH}")
                self.charge(len(part))
                todo += ((inner, depth + 1) for inner in part)
            elif type(part) is int:
                self.charge(part.bit_length() >> 6)
            elif isinstance(part, (list, dict)):
                return OpaqueKey(key)
        # Numbers and tuples with one hash are easily made, and each would be compared with all before, also by whoever
        # reads the pickle after this.
        value = hash(key)
        if self._first_of_hash.setdefault(value, key) != key:
            self._num_of_hash[value] = self._num_of_hash.get(value, 0) + 1
            self.charge(self._num_of_hash[value])
        is_flat = not isinstance(key, tuple) or all(type(part) in _LEAVES for part in key)
        return key if is_flat else OpaqueKey(key)

    def _argument(self, opcode: int) -> Any:
        self._stream.seek(self.position)
        value = _ARGUMENTS[opcode](self._stream)
        self.position = self._stream.tell()
        return value

    def _line(self) -> str:
        end = self.data.index(b"\n", self.position)
        raw, self.position = self.data[self.position : end], end + 1
        return str(raw, "utf-8", "surrogateescape")

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def _put(self, key: int) -> None:
        self.memo[key] = self.stack[-1]

    def _pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _pop(self) -> None:
        # Also what pops a mark: see pickle.py.
        if self.stack:
            self.stack.pop()
        else:
            self._pop_mark()

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        else:
            self.extend(target, items)

    def _set_items(self, items: Sequence[Any]) -> None:
        target = self.stack[-1]
        if len(items) % 2:
            raise ValueError("a key without a value")
        is_dict = isinstance(target, dict)
        pairs = target if is_dict else {}
        for k in range(0, len(items), 2):
            key = items[k]
            pairs[key if type(key) is str else self.key(key)] = items[k + 1]
        if not is_dict:
            self.set_items(target, pairs)

    def _new_dict(self) -> None:
        items = self._pop_mark()
        self._push({})
        self._set_items(items)

    def _called(self, function: Any, args: Any) -> Any:
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
        return self.call(function, args)

    def _new_object(self) -> None:
        args = self.stack.pop()
        self._push(self._called(self.stack.pop(), args))

    def _from_mark(self) -> None:
        made, *args = self._pop_mark()
        self._push(self._called(made, tuple(args)))

    def _build(self) -> None:
        state = self.stack.pop()
        if type(state) in _SIZED:
            self.charge(len(state))
        self.build(self.stack[-1], state)

    def _named(self, module: Any, attribute: Any) -> Any:
        if not isinstance(module, str) or not isinstance(attribute, str):
            module, attribute = "", "?"
        if len(module) + len(attribute) > _MAX_NAME:
            raise MalformedPickleError(f"it names something in more than {_MAX_NAME} characters")
        return self.name(module, attribute)


_CODES = {info.name: ord(info.code) for info in pickletools.opcodes}
_ARGUMENTS: dict[int, Callable[[io.BytesIO], Any]] = {
    **{ord(info.code): info.arg.reader for info in pickletools.opcodes if info.arg is not None},
    _CODES["BYTEARRAY8"]: pickletools.read_bytes8,
    # `pickletools` before Python 3.13 takes nothing but ASCII.
    _CODES["STRING"]: lambda f: str(codecs.escape_decode(pickletools.read_stringnl(f, decode=False))[0], "latin1"),
    _CODES["NONE"]: lambda _: None,
    _CODES["NEWTRUE"]: lambda _: True,
    _CODES["NEWFALSE"]: lambda _: False,
}
_LITERALS = {
    _CODES[name]
    for kinds in (
        "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT",
        "STRING BINSTRING SHORT_BINSTRING UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8",
        "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8",
    )
    for name in kinds.split()
}
_HANDLERS: dict[int, Callable[[PickleReader], object]] = {
    _CODES[name]: handler
    for name, handler in {
        "PROTO": lambda r: r._argument(_CODES["PROTO"]),
        "FRAME": lambda r: r._argument(_CODES["FRAME"]),
        "PUT": lambda r: r._put(r._argument(_CODES["PUT"])),
        "MEMOIZE": lambda r: r._put(len(r.memo)),
        "GET": lambda r: r._push(r.memo[r._argument(_CODES["GET"])]),
        "POP": PickleReader._pop,
        "POP_MARK": PickleReader._pop_mark,
        "DUP": lambda r: r._push(r.stack[-1]),
        "EMPTY_TUPLE": lambda r: r._push(()),
        "TUPLE3": lambda r: r._push((r.stack.pop(-3), r.stack.pop(-2), r.stack.pop())),
        "EMPTY_LIST": lambda r: r._push([]),
        "LIST": lambda r: r._push(r._pop_mark()),
        "APPEND": lambda r: r._extend([r.stack.pop()]),
        "APPENDS": lambda r: r._extend(r._pop_mark()),
        "EMPTY_SET": lambda r: r._push([]),
        "ADDITEMS": lambda r: r._extend(r._pop_mark()),
        "FROZENSET": lambda r: r._push(r._pop_mark()),
        "EMPTY_DICT": lambda r: r._push({}),
        "DICT": PickleReader._new_dict,
        "SETITEM": lambda r: r._set_items((r.stack.pop(-2), r.stack.pop())),
        "SETITEMS": lambda r: r._set_items(r._pop_mark()),
        "GLOBAL": lambda r: r._push(r._named(r._line(), r._line())),
        "EXT1": lambda r: r._push(r.name("extension", str(r._argument(_CODES["EXT1"])))),
        "EXT2": lambda r: r._push(r.name("extension", str(r._argument(_CODES["EXT2"])))),
        "EXT4": lambda r: r._push(r.name("extension", str(r._argument(_CODES["EXT4"])))),
        "STACK_GLOBAL": lambda r: r._push(r._named(r.stack.pop(-2), r.stack.pop())),
        "NEWOBJ": PickleReader._new_object,
        "NEWOBJ_EX": lambda r: (r.stack.pop(), r._new_object()),
        "OBJ": PickleReader._from_mark,
        "INST": lambda r: r._push(r._called(r._named(r._line(), r._line()), tuple(r._pop_mark()))),
        "BUILD": PickleReader._build,
        "PERSID": lambda r: r._push(r.persistent(r._line())),
    }.items()
}


class Contents(PickleReader):
    """Containers and bytes that pickles spell as calls become what they are."""

    def known(self, name: str, args: tuple[Any, ...]) -> Any:
        if name in ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict"):
            return OrderedDict()
        module, _, kind = name.partition(".")
        if kind in ("set", "frozenset", "list", "bytearray") and module in BUILTINS:
            return list(args[0]) if args and isinstance(args[0], (list, tuple)) else None
        if name == "_codecs.encode" and len(args) == 2 and args[1] == "latin1" and isinstance(args[0], str):
            return args[0].encode("latin1")
        return None


def read_inert(pickled: bytes | memoryview) -> Any:
    """The structure that `pickled` describes: str, numbers, bytes, list, tuple, dict, `Inert`, `Name`, `PersistentId`.
    Raises MalformedPickleError."""
    return Contents(pickled).read()
