"""A part of a file, chosen by the beginning of its dotted names: ``model.`` is ``['model']['layers.0.weight']`` and all
beside it."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import TypeVar

from ..errors import StateMismatchError

F = TypeVar("F")
W = TypeVar("W")
_KEY = re.compile(r"""\[((?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[^\]'"]+))\]""", re.S)
_SHOWN = 5


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
        shown = ", ".join(there[:_SHOWN]) + (f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else "")
        raise StateMismatchError(
            f"{file} has no tensor whose name begins with {prefix!r}; it has {shown or 'none'}", (prefix,)
        )
    whole = {path: leaf for path, leaf in wanted.items() if dotted(path).startswith(prefix)}
    given = whole or dict(wanted)
    name_of = {path: dotted(path) if whole else prefix + dotted(path) for path in given}
    chosen = {path: names[name] for path, name in name_of.items() if name in names}
    taken = set(name_of.values())
    # What nobody has given: told as unexpected, by its own name.
    chosen |= {name: leaf for name, leaf in names.items() if name not in taken}
    return chosen, given, name_of
