"""Walks nested state: dicts, lists and tuples, with key paths as in ``['model']['layers.0.weight']`` and ``['groups'][1]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import UnsupportedStateError


def flatten(state: Any) -> list[tuple[str, Any]]:
    """(key path, leaf) of every leaf, in order; a container inside itself is passed over.

    Raises:
        UnsupportedStateError: nested too deeply.
    """
    try:
        return list(_walk(state, "", set()))
    except RecursionError as error:
        raise UnsupportedStateError("the state is nested too deeply to be matched by key path") from error


def _items(container: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(container, dict):
        return list(container.items())
    if isinstance(container, (list, tuple)):
        return list(enumerate(container))
    return None


def _walk(value: Any, path: str, above: set[int]) -> Iterator[tuple[str, Any]]:
    items = _items(value)
    if items is None:
        yield path, value
    elif id(value) not in above:
        above.add(id(value))
        for key, item in items:
            yield from _walk(item, f"{path}[{key!r}]", above)
        above.discard(id(value))


def replace_leaves(state: Any, new: Mapping[str, Any]) -> Any:
    """`state` with the leaves at these key paths exchanged: dicts and lists in place, tuples made anew."""
    return _replace(state, "", new, set())


def _replace(value: Any, path: str, new: Mapping[str, Any], above: set[int]) -> Any:
    items = _items(value)
    if items is None:
        return new.get(path, value)
    if id(value) in above:
        return value
    above.add(id(value))
    replaced = [_replace(item, f"{path}[{key!r}]", new, above) for key, item in items]
    above.discard(id(value))
    if isinstance(value, tuple):
        if all(old is now for (_, old), now in zip(items, replaced, strict=True)):
            return value
        return type(value)(*replaced) if hasattr(value, "_fields") else type(value)(replaced)
    for (key, _), item in zip(items, replaced, strict=True):
        value[key] = item
    return value
