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
_MAX_SHOWN = 200
_FREE_CHARACTERS = 64 << 20
_CHARACTERS_PER_BYTE = 16
_KEY = re.compile(r"""\[((?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\[\]'"]+))\]""", re.S)
F = TypeVar("F")
W = TypeVar("W")


def flatten(state: Any, num_bytes: int | None = None) -> list[tuple[str, Any]]:
    """(key path, leaf) of every leaf, in order; a container inside itself is passed over. Nothing recurses. Raises
    UnsupportedStateError: nested deeper than `MAX_DEPTH`; or the key paths are far longer than `num_bytes`
    account for, what the state was read from, where somebody may have made that to blow up."""
    found: list[tuple[str, Any]] = []
    left = None if num_bytes is None else _FREE_CHARACTERS + _CHARACTERS_PER_BYTE * num_bytes

    def note(path: str, leaf: Any) -> Any:
        found.append((path, leaf))
        return leaf

    _walk(state, note, left)
    return found


def replace_leaves(state: Any, new: Mapping[str, Any]) -> Any:
    """`state` with the leaves at these key paths exchanged: dicts and lists in place, tuples made anew. Nothing
    recurses. Raises UnsupportedStateError: as `flatten`."""
    return _walk(state, new.get)


def _walk(state: Any, on_leaf: Callable[[str, Any], Any], characters_left: int | None = None) -> Any:
    """Depth first: `on_leaf` gives what takes a leaf's place."""
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
        stack[-1][3].append(_rebuilt(container, items, done))


def _text(key: Any) -> str:
    try:
        return repr(key)
    except ValueError:
        # Python writes out no number of more than some thousand digits.
        return f"<huge {type(key).__name__}, hash {hash(key)}>"


def _items(container: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(container, dict):
        # By its class: a file's OrderedDict may have an attribute of a method's name.
        return list(type(container).items(container))
    if isinstance(container, (list, tuple)):
        return list(enumerate(container))
    return None


def _rebuilt(container: Any, items: list[tuple[Any, Any]], done: list[Any]) -> Any:
    if all(old is now for (_, old), now in zip(items, done, strict=True)):
        return container
    if isinstance(container, tuple):
        return type(container)(*done) if hasattr(container, "_fields") else type(container)(done)
    for (key, _), item in zip(items, done, strict=True):
        container[key] = item
    return container


def dotted(path: str) -> str:
    """A key path as people write it: ``['a']['b.c'][1]`` is ``a.b.c.1``."""
    keys = _KEY.findall(path)
    return ".".join(str(ast.literal_eval(key)) if key[:1] in "'\"" else key for key in keys)


def match_leaves(
    found: Mapping[str, F], wanted: Mapping[str, W], prefix: str, rename: Mapping[str, str], file: str
) -> tuple[dict[str, F], dict[str, W], dict[str, str]]:
    """The leaves of a file whose dotted names begin with `prefix`, and the given ones that they are for, by the key
    paths of the latter; and the file's key path of each. The given state has the file's structure, or is the selected
    part alone (its names are the file's without `prefix`); `rename` maps names in the file to names in it. Raises
    StateMismatchError: nothing has the prefix, or a key of `rename`; two have one name. Names them."""
    selected = {path: name for path in found if (name := dotted(path)).startswith(prefix)}
    there = escaped(some_of(sorted({dotted(path).partition(".")[0][:_MAX_SHOWN] for path in found}))) or "none"
    if not selected:
        raise StateMismatchError(f"{file} has no tensor whose name begins with {prefix!r}; it has {there}", (prefix,))
    renamed = {path: _renamed(name, rename, prefix) for path, name in selected.items()}
    idle = tuple(key for key in rename if key not in {key for _, key in renamed.values()})
    if idle:
        which = f" of those whose name begins with {prefix!r}" if prefix else ""
        listed = ", ".join(map(repr, idle))
        raise StateMismatchError(f"rename: {file} has no tensor named {listed}{which}; it has {there}", idle)
    # Where the whole state is given, the rest of it is not asked for.
    regions = {rename[key] for new, key in renamed.values() if key is not None and not new.startswith(prefix)}
    whole = {
        path: leaf
        for path, leaf in wanted.items()
        if (name := dotted(path)).startswith(prefix) or any(_fits(region, name) for region in regions)
    }
    given = whole or dict(wanted)
    by_name = _by_name({path: dotted(path) for path in given}, "the given state")
    origin: dict[str, str] = {}
    for new, path in _by_name({path: new for path, (new, _) in renamed.items()}, file).items():
        target = by_name.get(new, by_name.get(new.removeprefix(prefix)))
        old = selected[path]
        # What nobody has given is told as unexpected, by its own name.
        key = target or (old if new == old else f"{old} (renamed to {new})")
        if key in origin:
            raise StateMismatchError(f"{file}: {selected[origin[key]]!r} and {old!r} are both for {key}", (key,))
        origin[key] = path
    return {key: found[path] for key, path in origin.items()}, given, origin


def _renamed(name: str, rename: Mapping[str, str], prefix: str) -> tuple[str, str | None]:
    """The name that `rename` gives a tensor of the file, and the key that does: the longest that fits its name, or
    else its name without `prefix`."""
    for front, rest in {"": name, prefix: name.removeprefix(prefix)}.items():
        key = max((key for key in rename if _fits(key, rest)), key=len, default=None)
        if key is not None:
            end = rest[len(key) :]
            return front + (rename[key] + end if rename[key] else end.removeprefix(".")), key
    return name, None


def _fits(key: str, name: str) -> bool:
    """Whether it is the name, or whole parts of its beginning."""
    return name == key or name.startswith(key if key[-1:] in ("", ".") else f"{key}.")


def _by_name(names: Mapping[str, str], where: str) -> dict[str, str]:
    """Key paths by name. Raises StateMismatchError: two have the same one."""
    paths: dict[str, str] = {}
    for path, name in names.items():
        if paths.setdefault(name, path) != path:
            what = f"{where}: {paths[name]} and {path} would both be {name!r}; nothing was changed"
            raise StateMismatchError(what, (name,))
    return paths
