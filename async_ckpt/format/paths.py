"""Which tag a path given by a user belongs to: relative to the tag, or below the root as DeepSpeed gives it."""

from __future__ import annotations

import os
import re

from ..errors import UnsafePathError
from .manifest import check_relative_path, check_tag
from .names import check_existing_tag, shown

StrPath = str | os.PathLike[str]


def is_url(path: object) -> bool:
    """Whether `path` names a store ("s3://bucket/run") rather than a local path."""
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path) is not None


class Root:
    """A directory of checkpoints. A relative one is resolved once, here: a later `os.chdir` does not move it."""

    def __init__(self, root: StrPath) -> None:
        given = os.fspath(root)
        if is_url(given):
            self.path = given.rstrip("/")
            self._prefixes = [self.path]
            return
        self.path = os.path.abspath(given)
        """Absolute; links in it are kept. Of a store: its URL."""
        # However the user writes it. (The root "/" leaves nothing to compare with: its paths are relative ones.)
        self._prefixes = [prefix for prefix in (given.rstrip("/"), self.path.rstrip("/"), os.path.realpath(given).rstrip("/")) if prefix]

    def is_named_by(self, path: StrPath) -> bool:
        """Whether `path` is the root itself."""
        return os.fspath(path).rstrip("/") in self._prefixes or os.path.abspath(os.fspath(path)) == self.path

    def split(self, path: StrPath, *, carried: bool = False) -> tuple[str | None, tuple[str, ...]]:
        """The tag that `path` names, and the checked components inside it; the tag is None for a path relative to a tag.

        "<root>/<tag>/a/b.pt" gives (tag, ("a", "b.pt")), whether the root is written as it was given or absolute.
        No component is ever resolved: ".." and links are refused, not followed. The file's name is another tool's where it is `carried`.

        Raises:
            UnsafePathError: malformed, or absolute and outside the root.
        """
        is_below, inner = self._below(path)
        if not is_below:
            return None, check_relative_path(inner, stored=carried)
        tag, _, rest = inner.partition("/")
        return check_tag(tag), check_relative_path(rest, stored=carried) if rest else ()

    def split_committed(self, path: StrPath, *, tag: str | None = None) -> tuple[str, str]:
        """The tag and the file of "<tag>/file.pt" or "<root>/<tag>/file.pt"; with `tag` also of "file.pt", in that checkpoint.

        Raises:
            UnsafePathError: malformed, outside the root, in another checkpoint than `tag`, or no file inside one.
        """
        is_below, inner = self._below(path)
        if tag is None or is_below:
            found, _, inner = inner.partition("/")
            check_existing_tag(found)
            if tag not in (None, found) or not inner:
                what = "a checkpoint; give '<tag>/<file>'" if tag is None else f"the checkpoint {shown(tag)}"
                raise UnsafePathError(f"path {shown(os.fspath(path))} names no file inside {what}; nothing was touched")
            tag = found
        return tag, "/".join(check_relative_path(inner, stored=True))

    def _below(self, path: StrPath) -> tuple[bool, str]:
        """Whether the path begins with the root, and what it says behind that."""
        text = os.fspath(path)
        if not isinstance(text, str):
            raise UnsafePathError(f"a path must be a str or os.PathLike[str], not {type(text).__name__}; nothing was touched")
        for prefix in self._prefixes:
            if text.startswith(prefix + "/"):
                return True, text[len(prefix) + 1 :]
        if text.startswith("/"):
            raise UnsafePathError(f"path {shown(text)} is absolute and not below the root {shown(self.path)}; nothing was touched")
        return False, text
