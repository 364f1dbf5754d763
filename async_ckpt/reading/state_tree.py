"""Walks nested state: dicts, lists and tuples, with key paths as in ``['model']['layers.0.weight']`` and
``['groups'][1]``."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..errors import StateMismatchError, UnsupportedStateError, escaped, some_of

MAX_DEPTH = 2000
"""Key paths of deeper structures would take far more memory than the structures themselves."""
_FREE_CHARACTERS = 64 << 20
_CHARACTERS_PER_BYTE = 16
_KEY = re.compile(r"""\[((?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\]'"]+))\]""", re.S)
F = TypeVar("F")
W = TypeVar("W")


def flatten(state: Any, num_bytes: int | None = None) -> list[tuple[str, Any]]:
    """(key path, leaf) of every leaf, in order; a container inside itself is passed over. Nothing recurses.

    Args:
        num_bytes: what the state was read from, where somebody may have made that to blow up.

    Raises:
        UnsupportedStateError: nested deeper than `MAX_DEPTH`, or the key paths are far longer than `num_bytes` accounts
            for.
    """
    found: list[tuple[str, Any]] = []
    left = None if num_bytes is None else _FREE_CHARACTERS + _CHARACTERS_PER_BYTE * num_bytes
    _walk(state, lambda path, leaf: found.append((path, leaf)), lambda container, items, done: container, left)
    return found


def replace_leaves(state: Any, new: Mapping[str, Any]) -> Any:
    """`state` with the leaves at these key paths exchanged: dicts and lists in place, tuples made anew. Nothing
    recurses. Raises UnsupportedStateError: as `flatten`."""
    return _walk(state, new.get, _rebuilt)


def _walk(
    state: Any,
    on_leaf: Callable[[str, Any], Any],
    on_end: Callable[[Any, list[tuple[Any, Any]], list[Any]], Any],
    characters_left: int | None = None,
) -> Any:
    """Depth first: `on_leaf` gives what takes a leaf's place, `on_end(container, its items, what took their places)` a
    container's."""
    stack: list[tuple[Any, str, list[tuple[Any, Any]], list[Any]]] = [(None, "", [("", state)], [])]
    above: set[int] = set()
    while True:
        container, path, items, done = stack[-1]
        if len(done) < len(items):
            key, item = items[len(done)]
            item_path = f"{path}[{_text(key)}]" if len(stack) > 1 else ""
            if characters_left is not None:
                characters_left -= len(item_path) + 1
                if characters_left < 0:
                    what = "the state refers to the same containers or long keys too often to be matched by key path"
                    raise UnsupportedStateError(what)
            inner = _items(item)
            if inner is None:
                done.append(on_leaf(item_path, item))
            elif id(item) in above:
                done.append(item)
            elif len(stack) > MAX_DEPTH:
                raise UnsupportedStateError(
                    f"the state is nested deeper than {MAX_DEPTH} levels, too deep to be matched by key path"
                )
            else:
                above.add(id(item))
                stack.append((item, item_path, inner, []))
            continue
        stack.pop()
        if not stack:
            return done[0]
        above.discard(id(container))
        stack[-1][3].append(on_end(container, items, done))


def _text(key: Any) -> str:
    try:
        return repr(key)
    except ValueError:
        # Python writes out no number of more than some thousand digits.
        return f"<huge {type(key).__name__}, hash {hash(key)}>"


def _items(container: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(container, dict):
        return list(container.items())
    if isinstance(container, (list, tuple)):
        return list(enumerate(container))
    return None


def _rebuilt(container: Any, items: list[tuple[Any, Any]], done: list[Any]) -> Any:
    if isinstance(container, tuple):
        if all(old is now for (_, old), now in zip(items, done, strict=True)):
            return container
        return type(container)(*done) if hasattr(container, "_fields") else type(container)(done)
    for (key, _), item in zip(items, done, strict=True):
        container[key] = item
    return container


def dotted(path: str) -> str:
    """A key path as people write it: ``['a']['b.c'][1]`` is ``a.b.c.1``."""
    keys = _KEY.findall(path)
    return ".".join(str(ast.literal_eval(key)) if key[:1] in "'\"" else key for key in keys)


def select_leaves(
    found: Mapping[str, F], wanted: Mapping[str, W], prefix: str, file: str
) -> tuple[dict[str, F], dict[str, W], dict[str, str]]:
    """The leaves of a file whose names begin with `prefix`, and the given ones that they are for, by the key paths of
    the latter.

    The given state has the file's structure, or is the selected part alone (its names are the file's without `prefix`).
    The third result is the file's dotted name of each.

    Raises:
        StateMismatchError: the file has nothing of that name; says what it has.
    """
    names = {dotted(path): leaf for path, leaf in found.items() if dotted(path).startswith(prefix)}
    if not names:
        there = sorted({dotted(path).partition(".")[0] for path in found})
        shown = escaped(some_of(there)) or "none"
        raise StateMismatchError(f"{file} has no tensor whose name begins with {prefix!r}; it has {shown}", (prefix,))
    whole = {path: leaf for path, leaf in wanted.items() if dotted(path).startswith(prefix)}
    given = whole or dict(wanted)
    name_of = {path: dotted(path) if whole else prefix + dotted(path) for path in given}
    chosen = {path: names[name] for path, name in name_of.items() if name in names}
    taken = set(name_of.values())
    # What nobody has given: told as unexpected, by its own name.
    chosen |= {name: leaf for name, leaf in names.items() if name not in taken}
    return chosen, given, name_of
