"""Reads any pickle as plain data: what it would import or call becomes an inert note of the name and the arguments.

Guarantees:
- Nothing named by the pickle is imported, called or hashed; keys are compared by their text.
- At most `MAX_OPCODES` opcodes are read, and nothing recurses: time and memory are bounded whatever the bytes say.
"""

from __future__ import annotations

import codecs
import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

MAX_OPCODES = 20_000_000
"""About a million tensors; a small object per opcode, so two gigabytes of memory at the very worst."""
_MAX_TEXT = 80


class MalformedPickleError(Exception):
    """No pickle, or one with more opcodes than are read."""


class InertDict:
    """A dict by the text of its keys: text -> (key as a path part, value)."""

    __slots__ = ("_keys", "entries")

    def __init__(self) -> None:
        self.entries: dict[str, tuple[str, Any]] = {}
        self._keys: dict[str, Any] = {}

    def set(self, key: Any, value: Any) -> None:
        """As ``self[key] = value``; keys that are no plain values are never equal."""
        if type(key) is str:
            self.entries["s" + key] = (key, value)
        else:
            text = describe(key)
            # Of these the text says too little.
            vague = isinstance(key, (Inert, list, InertDict, tuple, bytes)) or (isinstance(key, int) and key.bit_length() > 256)
            unique = f"{text}#{len(self.entries)}" if vague else text
            self.entries[unique] = (text, value)
            self._keys[unique] = key

    def key(self, text: str) -> Any:
        """The key itself of the entry `text`."""
        return self._keys[text] if text in self._keys else self.entries[text][0]


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function, by name only."""

    text: str


@dataclass(frozen=True, slots=True)
class PersistentId:
    """What the pickle leaves to its reader: in torch's files, a storage."""

    value: Any


@dataclass(eq=False, slots=True)
class Inert:
    """An object that was not made: who would make it, from what, and what it would be given."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: Any = None
    """A list or an `InertDict` of what it contains."""
    data: Any = None
    """What `Call` found in it: for a tensor subclass, its tensor."""


Call = Callable[[str, tuple[Any, ...]], Any]
"""Gets the name and the arguments of a call; returns what to put in its place, or None."""


def read_inert(pickled: bytes, call: Call) -> Any:
    """The structure that `pickled` describes: str, numbers, bytes, list, tuple, `InertDict`, `Inert`, `Name`, `PersistentId`.

    Raises:
        MalformedPickleError: see there.
    """
    reader = _Reader(pickled, call)
    try:
        return reader.run()
    except (LookupError, ValueError, TypeError, OverflowError, AttributeError, struct.error) as error:
        raise MalformedPickleError(f"malformed at byte {reader.at}: {type(error).__name__}: {error}") from error


def fingerprint(*values: Any) -> str:
    """A checksum of everything that `values` hold, but for what is in place of tensors. Time is linear; nothing recurses."""
    digest = hashlib.blake2b(digest_size=16)
    seen: dict[int, int] = {}
    todo: list[Any] = list(values)
    while todo:
        value = todo.pop()
        parts: list[Any] = []
        if isinstance(value, (Inert, InertDict, list, tuple)):
            if id(value) in seen:
                text = f"again {seen[id(value)]}"
            else:
                seen[id(value)] = len(seen)
                if isinstance(value, InertDict):
                    parts = [part for key, (_, item) in value.entries.items() for part in (key, item)]
                else:
                    parts = [value.name, value.args, value.state, value.items] if isinstance(value, Inert) else list(value)
                text = f"{type(value).__name__} of {len(parts)}"
        elif isinstance(value, PersistentId):
            text, parts = "persistent id", [value.value]
        elif isinstance(value, int):
            text = f"{type(value).__name__} {value:x}"
        elif isinstance(value, (Name, float, NoneType)):
            text = repr(value)
        else:
            raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value if isinstance(value, bytes) else b""
            text = f"{type(value).__name__} of {len(raw)}"
            digest.update(raw)
        digest.update(f";{text};".encode("utf-8", "surrogatepass"))
        todo += parts
    return digest.hexdigest()


def describe(value: Any) -> str:
    """`value` in at most some 100 characters, without looking deep into it."""
    if isinstance(value, Inert):
        return _describe_inert(value)
    if isinstance(value, Name):
        return f"<{value.text}>"
    if isinstance(value, PersistentId):
        return "<persistent id>"
    if isinstance(value, (InertDict, list)):
        num = len(value.entries) if isinstance(value, InertDict) else len(value)
        return f"<{'dict' if isinstance(value, InertDict) else 'list'} of {num}>"
    if isinstance(value, tuple):
        shown = [describe(part) if not isinstance(part, (tuple, list)) else "..." for part in value[:8]]
        return _short("(" + ", ".join(shown) + (", ..." if len(value) > 8 else "") + ")")
    if isinstance(value, int) and value.bit_length() > 256:
        return f"<int of {value.bit_length()} bits>"
    if isinstance(value, (bytes, bytearray)) and len(value) > 16:
        return f"<{len(value)} bytes>"
    return _short(repr(value if not isinstance(value, str) else value[:_MAX_TEXT]))


def _describe_inert(value: Inert) -> str:
    state = value.state
    if value.name.endswith("multiarray._reconstruct") and isinstance(state, tuple) and len(state) >= 3:
        kind = state[2].args[0] if isinstance(state[2], Inert) and state[2].args else "?"
        return _short(f"<numpy.ndarray {kind} {_dims(state[1])}>")
    plain = [describe(arg) for arg in value.args[:4] if isinstance(arg, (str, int, float, bool, Name, bytes))]
    return _short(f"<{value.name}{'(' + ', '.join(plain) + ')' if plain else ''}>")


def _dims(shape: Any) -> str:
    return "[" + ", ".join(str(n) for n in shape[:16] if type(n) is int and n.bit_length() < 64) + "]" if isinstance(shape, tuple) else "?"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 4] + "..." + text[-1]


@dataclass(eq=False)
class _Reader:
    data: bytes
    call: Call
    at: int = 0
    stack: list[Any] = field(default_factory=list)
    marks: list[list[Any]] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def run(self) -> Any:
        data, handlers = self.data, _HANDLERS
        for _ in range(MAX_OPCODES):
            opcode = data[self.at]
            self.at += 1
            if opcode == 0x2E:  # STOP
                return self.stack.pop()
            handlers[opcode](self)
        raise MalformedPickleError(f"it has more than {MAX_OPCODES} opcodes")

    # Bytes.

    def take(self, num_bytes: int) -> bytes:
        start = self.at
        if num_bytes < 0 or start + num_bytes > len(self.data):
            raise ValueError("truncated")
        self.at = start + num_bytes
        return self.data[start : self.at]

    def sized(self, width: int) -> bytes:
        return self.take(int.from_bytes(self.take(width), "little"))

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        return str(self.take(end + 1 - self.at)[:-1], "utf-8", "surrogateescape")

    # The stack.

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def pop(self) -> None:
        # Also what pops a mark: see pickle.py.
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def tuple_of(self, num: int) -> None:
        if len(self.stack) < num:
            raise ValueError("stack underflow")
        self.stack[-num:] = [tuple(self.stack[-num:])]

    # Containers.

    def extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif isinstance(target, Inert):
            if not isinstance(target.items, list):
                target.items = []
            target.items.extend(items)
        else:
            raise ValueError(f"items for a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            if not isinstance(target.items, InertDict):
                target.items = InertDict()
            target = target.items
        if not isinstance(target, InertDict) or len(items) % 2:
            raise ValueError("items for no dict")
        for k in range(0, len(items), 2):
            target.set(items[k], items[k + 1])

    def append(self) -> None:
        value = self.stack.pop()
        self.extend([value])

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([key, value])

    def new_dict(self) -> None:
        items = self.pop_mark()
        self.push(InertDict())
        self.set_items(items)

    # Objects.

    def reduce(self) -> None:
        args, made = self.stack.pop(), self.stack.pop()
        self.make(made, args if isinstance(args, tuple) else (args,))

    def make(self, made: Any, args: tuple[Any, ...]) -> None:
        name = made.text if isinstance(made, Name) else describe(made)
        found = self.call(name, args)
        if found is None:
            found = _known(name, args)
        self.push(Inert(name, args) if found is None else found)

    def new_with_keywords(self) -> None:
        self.stack.pop()
        self.reduce()

    def from_mark(self) -> None:
        made, *args = self.pop_mark()
        self.make(made, tuple(args))

    def instance(self) -> None:
        name = f"{self.line()}.{self.line()}"
        self.make(Name(name), tuple(self.pop_mark()))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        # A state of a plain dict is `Module.state_dict`'s note of versions.
        if isinstance(target, Inert):
            target.state = state

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push(Name(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?"))


def _known(name: str, args: tuple[Any, ...]) -> Any:
    """Containers and bytes that pickles spell as calls."""
    if name in ("collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict"):
        return InertDict()
    if name.partition(".")[2] in ("set", "frozenset", "list", "bytearray") and name.startswith(("builtins.", "__builtin__.")):
        return list(args[0]) if args and isinstance(args[0], (list, tuple)) else None
    if name == "_codecs.encode" and len(args) == 2 and args[1] == "latin1" and isinstance(args[0], str):
        return args[0].encode("latin1")
    return None


def _quoted(text: str) -> str:
    raw = text.encode("utf-8", "surrogateescape")
    return str(codecs.escape_decode(raw[1:-1])[0], "latin1")


def _handlers() -> list[Callable[[_Reader], object]]:
    def unknown(reader: _Reader) -> None:
        raise ValueError(f"unknown opcode {reader.data[reader.at - 1]:#04x}")

    def put(reader: _Reader, key: int) -> None:
        reader.memo[key] = reader.stack[-1]

    def text(width: int) -> Callable[[_Reader], object]:
        return lambda r: r.push(str(r.sized(width), "utf-8", "surrogatepass"))

    def signed(raw: bytes) -> int:
        return int.from_bytes(raw, "little", signed=True)

    table: list[Callable[[_Reader], object]] = [unknown] * 256
    known: dict[int | str, Callable[[_Reader], object]] = {
        "q": lambda r: put(r, r.number(1)),
        "r": lambda r: put(r, r.number(4)),
        "p": lambda r: put(r, int(r.line())),
        0x94: lambda r: put(r, len(r.memo)),
        "h": lambda r: r.push(r.memo[r.number(1)]),
        "j": lambda r: r.push(r.memo[r.number(4)]),
        "g": lambda r: r.push(r.memo[int(r.line())]),
        "(": _Reader.mark,
        "0": _Reader.pop,
        "1": _Reader.pop_mark,
        "2": lambda r: r.push(r.stack[-1]),
        "N": lambda r: r.push(None),
        0x88: lambda r: r.push(True),
        0x89: lambda r: r.push(False),
        "I": lambda r: r.push(_int(r.line())),
        "K": lambda r: r.push(r.number(1)),
        "M": lambda r: r.push(r.number(2)),
        "J": lambda r: r.push(signed(r.take(4))),
        "L": lambda r: r.push(int(r.line().rstrip("L"))),
        0x8A: lambda r: r.push(signed(r.sized(1))),
        0x8B: lambda r: r.push(signed(r.sized(4))),
        "G": lambda r: r.push(struct.unpack(">d", r.take(8))[0]),
        "F": lambda r: r.push(float(r.line())),
        "X": text(4),
        0x8C: text(1),
        0x8D: text(8),
        "V": lambda r: r.push(str(r.line().encode("utf-8", "surrogateescape"), "raw-unicode-escape")),
        "S": lambda r: r.push(_quoted(r.line())),
        "T": lambda r: r.push(str(r.sized(4), "latin1")),
        "U": lambda r: r.push(str(r.sized(1), "latin1")),
        "B": lambda r: r.push(r.sized(4)),
        "C": lambda r: r.push(r.sized(1)),
        0x8E: lambda r: r.push(r.sized(8)),
        0x96: lambda r: r.push(r.sized(8)),
        ")": lambda r: r.push(()),
        "]": lambda r: r.push([]),
        "}": lambda r: r.push(InertDict()),
        0x8F: lambda r: r.push([]),
        "t": lambda r: r.push(tuple(r.pop_mark())),
        "l": lambda r: r.push(r.pop_mark()),
        0x91: lambda r: r.push(r.pop_mark()),
        "d": _Reader.new_dict,
        0x85: lambda r: r.tuple_of(1),
        0x86: lambda r: r.tuple_of(2),
        0x87: lambda r: r.tuple_of(3),
        "a": _Reader.append,
        "e": lambda r: r.extend(r.pop_mark()),
        0x90: lambda r: r.extend(r.pop_mark()),
        "s": _Reader.set_item,
        "u": lambda r: r.set_items(r.pop_mark()),
        "c": lambda r: r.push(Name(f"{r.line()}.{r.line()}")),
        0x93: _Reader.stack_global,
        "R": _Reader.reduce,
        0x81: _Reader.reduce,
        0x92: _Reader.new_with_keywords,
        "o": _Reader.from_mark,
        "i": _Reader.instance,
        "b": _Reader.build,
        "Q": lambda r: r.push(PersistentId(r.stack.pop())),
        "P": lambda r: r.push(PersistentId(r.line())),
        0x80: lambda r: r.take(1),
        0x95: lambda r: r.take(8),
        0x82: lambda r: r.push(Name(f"extension {r.number(1)}")),
        0x83: lambda r: r.push(Name(f"extension {r.number(2)}")),
        0x84: lambda r: r.push(Name(f"extension {r.number(4)}")),
        0x97: lambda r: r.push(PersistentId("buffer")),
        0x98: lambda r: None,
    }
    for opcode, handler in known.items():
        table[ord(opcode) if isinstance(opcode, str) else opcode] = handler
    return table


def _int(text: str) -> int:
    # How protocol 0 spells booleans.
    return text == "01" if text in ("00", "01") else int(text)


_HANDLERS = _handlers()
