"""Which tag a path given by a user belongs to: relative to the tag, or below the root as DeepSpeed gives it."""

from __future__ import annotations

import os

from .errors import UnsafePathError
from .manifest import check_relative_path, check_tag

StrPath = str | os.PathLike[str]


def split_root(root: StrPath, path: StrPath, *, stored: bool = False) -> tuple[str | None, tuple[str, ...]]:
    """The tag that `path` names, and the checked components inside it; the tag is None for a path relative to a tag.

    "<root>/<tag>/a/b.pt" gives (tag, ("a", "b.pt")), whether the root is written as the user gave it or absolute.
    No component is ever resolved: ".." and links are refused, not followed.

    Raises:
        UnsafePathError: malformed, or absolute and outside the root.
    """
    text = os.fspath(path)
    if not isinstance(text, str):
        raise UnsafePathError(f"a path must be a str or os.PathLike[str], not {type(text).__name__}; nothing was touched")
    inner = _below(root, text)
    if inner is not None:
        tag, _, rest = inner.partition("/")
        return check_tag(tag), check_relative_path(rest, stored=stored) if rest else ()
    if text.startswith("/"):
        raise UnsafePathError(f"path {text[:200]!a} is absolute and not below the root {os.fspath(root)!r}; nothing was touched")
    return None, check_relative_path(text, stored=stored)


def split_committed(root: StrPath, path: StrPath) -> tuple[str, str]:
    """The tag and the file of "<tag>/file.pt" or "<root>/<tag>/file.pt".

    Raises:
        UnsafePathError: malformed, outside the root, or no file inside a tag.
    """
    tag, parts = split_root(root, path, stored=True)
    if tag is None:
        tag, parts = check_tag(parts[0]), parts[1:]
    if not parts:
        raise UnsafePathError(f"path {os.fspath(path)[:200]!a} names no file inside a checkpoint; give '<tag>/<file>'")
    return tag, "/".join(parts)


def _below(root: StrPath, text: str) -> str | None:
    given = os.fspath(root).rstrip("/")
    for prefix in (given, os.path.abspath(given), os.path.realpath(given)):
        # A root of "." or "" would swallow every relative path.
        if len(prefix) > 1 and text.startswith(prefix + "/"):
            return text[len(prefix) + 1 :]
    return None
