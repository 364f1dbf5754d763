"""Walks nested state: dicts, lists and tuples, with key paths as in ``['model']['layers.0.weight']`` and
``['groups'][1]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import UnsupportedStateError

MAX_DEPTH = 2000
"""Key paths of deeper structures would take far more memory than the structures themselves."""
_FREE_CHARACTERS = 64 << 20
_CHARACTERS_PER_BYTE = 16


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
    recurses.

    Raises:
        UnsupportedStateError: as `flatten`.
    """
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
            item_path = f"{path}[{key!r}]" if len(stack) > 1 else ""
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
