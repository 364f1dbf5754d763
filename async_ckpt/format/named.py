"""At which key paths of what a pickle describes its classes and functions, its scalars and its storages stand. No
torch; nothing is imported or called.
"""

from __future__ import annotations

import io
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..errors import some_of
from .inert import Inert, MalformedPickleError, Name, OpaqueKey, PersistentId, Placed, describe, printable
from .pickles import PickleReader
from .zip import lay_out

_MAX_NAMES = 20
_MAX_PATH = 400
"""Longer key paths are not followed: with each level, they would have to be copied."""


def names_in(pickled: bytes) -> frozenset[str]:
    """Every class and function that `pickled` names; none where it is not read."""
    reader = PickleReader(pickled)
    try:
        reader.read()
    except MalformedPickleError:
        return frozenset()
    return frozenset(reader.names)


def refused_in(pickled: bytes, ask: Callable[[io.BytesIO], Iterable[str]], names: Iterable[str] | None = None) -> str:
    """Every class and function of `pickled` that torch refuses, with key paths, in one line; empty where there is none,
    or it is not read. `ask` tells which of those in a file it refuses; `names`: what `names_in` gives, if known.
    """
    named = names_in(pickled) if names is None else names
    split = [name.rpartition(".") for name in sorted(named)]
    globals_ = "".join(f"c{module}\n{attribute}\n" for module, _, attribute in split)
    asked = b"\x80\x02(" + globals_.encode("utf-8", "surrogateescape") + b"t."
    file = b"".join(data for _, data in lay_out(asked, [], name_hash=bytes(20)).literals)
    refused = set(ask(io.BytesIO(file)))
    try:
        found = places_named(pickled, {name for name in named if _renamed(name) in refused}) if refused else {}
    except MalformedPickleError:
        return ""
    return listing({_renamed(name): places for name, places in found.items()})


def _renamed(name: str) -> str:
    """What Python 3, and torch, calls what a pickle of Python 2's protocols names so."""
    module, _, attribute = name.rpartition(".")
    return ".".join(NAME_MAPPING.get((module, attribute), (IMPORT_MAPPING.get(module, module), attribute)))


def places_named(pickled: bytes | memoryview, names: Collection[str]) -> dict[str, list[str]]:
    """The key paths of every object that `pickled` makes by one of `names`. Linear in time and memory. Raises
    MalformedPickleError: it is no pickle that is read."""
    found: dict[str, dict[str, None]] = {}
    for path, value in _walk(PickleReader(pickled).read()):
        text = value.text if isinstance(value, Name) else value.name if isinstance(value, Inert) else ""
        if text in names:
            found.setdefault(text, {})[path] = None
    return {name: list(paths) for name, paths in found.items()}


def placed(head: bytes) -> tuple[list[tuple[int, int, str]], list[str]]:
    """In a torch file whose part before the first payload is `head`: start, end and key path of each scalar and text in
    it, and the key path of each payload. Raises MalformedPickleError.
    """
    start = 30 + sum(struct.unpack_from("<HH", head, 26))
    scalars: list[tuple[int, int, str]] = []
    payloads: dict[int, str] = {}
    for path, value in _walk(PickleReader(head[start:], places=True).read()):
        if isinstance(value, Placed):
            scalars.append((start + value.start, start + value.end, path))
        elif isinstance(value, PersistentId):
            _, _, key, _, size = (part.value if isinstance(part, Placed) else part for part in value.value)
            if size:
                payloads.setdefault(int(key), path)
    return scalars, [payloads[key] for key in sorted(payloads)]


def _walk(root: Any) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", root)]
    while todo:
        path, value = todo.pop()
        yield path, value
        is_open = isinstance(value, (dict, list, tuple, Inert, PersistentId)) and id(value) not in seen
        if is_open and len(path) <= _MAX_PATH:
            seen.add(id(value))
            todo.extend(reversed(_children(path, value)))


def _children(path: str, value: Any) -> list[tuple[str, Any]]:
    children: list[tuple[str, Any]] = []
    if isinstance(value, PersistentId):
        children.append((path, value.value))
    elif isinstance(value, (list, tuple)):
        children += ((f"{path}[{index}]", child) for index, child in enumerate(value))
    elif isinstance(value, dict):
        for key, child in value.items():
            step = f"{path}[{describe(key)}]"
            if type(key) is OpaqueKey:
                children.append((f"{step} (the key)", key.value))
            children.append((step, child))
    else:
        children += ((path, child) for arg in value.args for child in (arg if isinstance(arg, tuple) else (arg,)))
        for state in value.states:
            if isinstance(state, dict):
                children += ((f"{path}.{_attribute(key)}", child) for key, child in state.items())
            else:
                children.append((path, state))
        children += _children(path, value.items or []) + _children(path, value.pairs or {})
    return children


def _attribute(key: Any) -> str:
    return printable(key[:_MAX_PATH]) if isinstance(key, str) else describe(key)


def listing(found: Mapping[str, Sequence[str]]) -> str:
    """`found` in one line, for messages."""
    lines = [
        f"{printable(name)} at {some_of(paths, show='state{}'.format)}"
        for name, paths in sorted(found.items())[:_MAX_NAMES]
    ]
    return "; ".join(lines) + (f"; and {len(found) - _MAX_NAMES} more types" if len(found) > _MAX_NAMES else "")
