"""Which tag a path given by a user belongs to: relative to the tag, or below the root as DeepSpeed gives it."""

from __future__ import annotations

import os

from .errors import UnsafePathError
from .manifest import check_relative_path, check_tag
from .names import shown

StrPath = str | os.PathLike[str]


class Root:
    """A directory of checkpoints. A relative one is resolved once, here: a later `os.chdir` does not move it."""

    def __init__(self, root: StrPath) -> None:
        given = os.fspath(root)
        self.path = os.path.abspath(given)
        """Absolute; links in it are kept."""
        # However the user writes it. (The root "/" leaves nothing to compare with: its paths are relative ones.)
        self._prefixes = [prefix for prefix in (given.rstrip("/"), self.path.rstrip("/"), os.path.realpath(given).rstrip("/")) if prefix]

    def is_named_by(self, path: StrPath) -> bool:
        """Whether `path` is the root itself."""
        return os.fspath(path).rstrip("/") in self._prefixes or os.path.abspath(os.fspath(path)) == self.path

    def split(self, path: StrPath, *, stored: bool = False) -> tuple[str | None, tuple[str, ...]]:
        """The tag that `path` names, and the checked components inside it; the tag is None for a path relative to a tag.

        "<root>/<tag>/a/b.pt" gives (tag, ("a", "b.pt")), whether the root is written as it was given or absolute.
        No component is ever resolved: ".." and links are refused, not followed. For `stored` see `check_relative_path`.

        Raises:
            UnsafePathError: malformed, or absolute and outside the root.
        """
        text = os.fspath(path)
        if not isinstance(text, str):
            raise UnsafePathError(f"a path must be a str or os.PathLike[str], not {type(text).__name__}; nothing was touched")
        for prefix in self._prefixes:
            if text.startswith(prefix + "/"):
                tag, _, rest = text[len(prefix) + 1 :].partition("/")
                return check_tag(tag), check_relative_path(rest, stored=stored) if rest else ()
        if text.startswith("/"):
            raise UnsafePathError(f"path {shown(text)} is absolute and not below the root {shown(self.path)}; nothing was touched")
        return None, check_relative_path(text, stored=stored)

    def split_committed(self, path: StrPath) -> tuple[str, str]:
        """The tag and the file of "<tag>/file.pt" or "<root>/<tag>/file.pt".

        Raises:
            UnsafePathError: malformed, outside the root, or no file inside a tag.
        """
        tag, parts = self.split(path, stored=True)
        if tag is None:
            tag, parts = check_tag(parts[0]), parts[1:]
        if not parts:
            raise UnsafePathError(f"path {shown(os.fspath(path))} names no file inside a checkpoint; give '<tag>/<file>'")
        return tag, "/".join(parts)

    def inside(self, tag: str, path: StrPath) -> str:
        """The file of checkpoint `tag` that `path` names: relative to the tag, or as "<root>/<tag>/...".

        Raises:
            UnsafePathError: malformed, or it points elsewhere than into this tag.
        """
        found, parts = self.split(path, stored=True)
        if found not in (None, tag) or not parts:
            raise UnsafePathError(f"path {shown(os.fspath(path))} names no file inside the checkpoint {shown(tag)}; nothing was touched")
        return "/".join(parts)
