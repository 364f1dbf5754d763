"""What a pickle says, as data: names and calls that stay notes, and what can be told of them. No torch."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

BUILTINS = ("builtins", "__builtin__")
_COMPLEX = tuple(f"{module}.complex" for module in BUILTINS)
_MAX_TEXT = 80
_FREE_STEPS = 1 << 18
_STEPS_PER_BYTE = 4
_LARGE_BYTES = 256


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


def key_value(key: Any) -> Any:
    """What a dict's key stands for."""
    return key.value if type(key) is OpaqueKey else key


@dataclass(eq=False, slots=True)
class Placed:
    """A scalar or text, and the bytes of the pickle that say it."""

    value: Any
    start: int
    end: int


@dataclass(eq=False, slots=True)
class PersistentId:
    """What the pickle leaves to its reader: in torch's files, a storage."""

    value: Any


@dataclass(eq=False, slots=True)
class Inert:
    """An object that was not made: who would make it, from what, and what it would be given."""

    name: str
    args: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] | None = None
    pairs: dict[Any, Any] | None = None
    data: Any = None
    """What a maker found in it: for a tensor subclass, its tensor."""

    @property
    def states(self) -> Sequence[Any]:
        """What it would be given, taken apart where that is several things."""
        return self.state if isinstance(self.state, (tuple, list)) else (self.state,)


class Notes:
    """What names, calls and persistent ids become while a pickle is read: notes. A subclass may make something else of
    them, and raises a ValueError or its like where they are malformed.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        """Every class and function that was named."""

    def name(self, module: str, attribute: str) -> Any:
        self.names.add(f"{module}.{attribute}")
        return Name(f"{module}.{attribute}")

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        name = function.text if type(function) is Name else describe(function)
        if name in _COMPLEX and args and all(type(arg) in (int, float) for arg in args):
            # They may be keys, and their hashes are easily chosen.
            return complex(*args)
        found = self.known(name, args)
        return Inert(name, args) if found is None else found

    def known(self, name: str, args: tuple[Any, ...]) -> Any:
        """What to put in a call's place, or None."""
        return OrderedDict() if not args and name == "collections.OrderedDict" else None

    def persistent(self, value: Any) -> Any:
        return PersistentId(value)

    def build(self, target: Any, state: Any) -> None:
        if type(target) is Inert:
            target.state = state
        elif type(target) is OrderedDict:
            # `Module.state_dict` carries its versions this way.
            vars(target)["state"] = state

    def extend(self, target: Any, items: list[Any]) -> None:
        """Give `items` to what is no list."""
        if type(target) is not Inert:
            raise MalformedPickleError(f"items for a {type(target).__name__}")
        target.items = target.items or []
        target.items.extend(items)

    def set_items(self, target: Any, pairs: dict[Any, Any]) -> None:
        """Give `pairs` to what is no dict."""
        if type(target) is not Inert:
            raise MalformedPickleError(f"pairs for a {type(target).__name__}")
        target.pairs = target.pairs or {}
        target.pairs.update(pairs)


class Fingerprint:
    """Checksums of everything that values of one pickle hold, but for what is in place of tensors. Nothing recurses.

    Raises MalformedPickleError where values that hold the same again and again would take more time than the
    `num_bytes` of the pickle account for.
    """

    def __init__(self, num_bytes: int) -> None:
        self._left = _FREE_STEPS + _STEPS_PER_BYTE * num_bytes
        self._large: dict[int, tuple[Any, bytes]] = {}
        """By identity, large leaves and their checksums: each is looked through once, however often it is met."""

    def __call__(self, *values: Any) -> str:
        digest = hashlib.blake2b(digest_size=16)
        seen: dict[int, int] = {}
        todo: list[Any] = list(values)
        while todo:
            value = key_value(todo.pop())
            kind, parts = "dict" if isinstance(value, dict) else type(value).__name__, []
            if isinstance(value, (Inert, dict, list, tuple)):
                if id(value) in seen:
                    kind = f"again {seen[id(value)]}"
                else:
                    seen[id(value)] = len(seen)
                    parts = _parts_of(value)
                    kind = f"{kind} of {len(parts)}"
            elif isinstance(value, PersistentId):
                kind, parts = "persistent id", [value.value]
            elif isinstance(value, (int, str, bytes)):
                digest.update(self._bytes_of(value))
                kind = kind if isinstance(value, int) else f"{kind} of {len(value)}"
            elif isinstance(value, (Name, float, complex, NoneType)):
                kind = repr(value)
            self._charge(1 + len(parts))
            digest.update(f";{kind};".encode("utf-8", "surrogatepass"))
            todo += parts
        return digest.hexdigest()

    def _bytes_of(self, value: int | str | bytes) -> bytes:
        """The bytes of a leaf; of a large one, their checksum."""
        if id(value) in self._large:
            return self._large[id(value)][1]
        text = f"{value:x}" if isinstance(value, int) else value
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        if len(raw) > _LARGE_BYTES:
            self._charge(len(raw) // _LARGE_BYTES)
            raw = hashlib.blake2b(raw, digest_size=16).digest()
            self._large[id(value)] = value, raw
        return raw

    def _charge(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise MalformedPickleError("what it refers to again and again is larger than all it holds")


def _parts_of(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [part for pair in value.items() for part in pair]
    return [value.name, value.args, value.state, value.items, value.pairs] if isinstance(value, Inert) else list(value)


def describe(value: Any) -> str:
    """`value` in at most some 100 printable characters, without looking deep into it."""
    value = key_value(value)
    value = value.value if isinstance(value, Placed) else value
    if isinstance(value, Name):
        return f"<{printable(value.text)}>"
    if isinstance(value, PersistentId):
        return "<persistent id>"
    if isinstance(value, (dict, list)):
        return f"<{'dict' if isinstance(value, dict) else 'list'} of {len(value)}>"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"<int of {value.bit_length()} bits>"
    if isinstance(value, (bytes, bytearray)) and len(value) > 16:
        return f"<{len(value)} bytes>"
    if isinstance(value, Inert):
        text = _describe_inert(value)
    elif isinstance(value, tuple):
        shown = [describe(part) if not isinstance(part, (tuple, list)) else "..." for part in value[:8]]
        text = "(" + ", ".join(shown) + (", ..." if len(value) > 8 else "") + ")"
    else:
        text = repr(value[:_MAX_TEXT] if isinstance(value, str) else value)
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 4] + "..." + text[-1]


def printable(text: str) -> str:
    """`text` without control characters or anything else that a terminal would obey."""
    return text if text.isprintable() else repr(text)[1:-1]


def _describe_inert(value: Inert) -> str:
    state = value.state
    if value.name.endswith("multiarray._reconstruct") and isinstance(state, tuple) and len(state) >= 3:
        _, shape, kind = state[:3]
        name = kind.args[0] if isinstance(kind, Inert) and kind.args else "?"
        name = printable(name[:_MAX_TEXT]) if isinstance(name, str) else "?"
        dims = [n for n in shape[:16] if type(n) is int and n.bit_length() < 64] if isinstance(shape, tuple) else "?"
        return f"<numpy.ndarray {name} [{', '.join(map(str, dims))}]>"
    plain = [describe(arg) for arg in value.args[:4] if isinstance(arg, (str, int, float, bool, Name, bytes))]
    return f"<{printable(value.name)}{'(' + ', '.join(plain) + ')' if plain else ''}>"
