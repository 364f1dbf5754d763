"""Where a DeepSpeed checkpoint goes: from what DeepSpeed says to a checkpoint root and a tag. Plain data."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ...engine.interface import StrPath, tag_of
from ...errors import ConfigError, UnsafePathError


@dataclass(frozen=True)
class Destination:
    """One checkpoint: the folder `<root>/<name>`, which DeepSpeed calls `<save_dir>/<tag>`.

    DeepSpeed's tags may hold "/": then the root of the checkpoint lies below `save_dir`.
    """

    save_dir: str
    tag: str
    root: str
    name: str
    save_latest: bool

    @classmethod
    def of(cls, info: Any, save_dir: str | None) -> Destination:
        """From a `CheckpointCommitInfo`, or from a bare tag and the engine's own `save_dir`.

        Raises:
            ConfigError: no save_dir is known. UnsafePathError: the tag leaves the save_dir.
        """
        given = getattr(info, "save_dir", save_dir)
        if given is None:
            raise ConfigError("a bare tag needs save_dir: give it to AsyncDeepSpeedEngine, or pass a CheckpointCommitInfo")
        base, tag = os.path.abspath(os.fspath(given)), tag_of(info)
        folder = os.path.normpath(os.path.join(base, tag))
        if not folder.startswith(base.rstrip("/") + "/"):
            raise UnsafePathError(f"tag {tag[:200]!a} leaves the save_dir {base!r}; nothing was touched")
        root, name = os.path.split(folder)
        return cls(base, tag, root, name, bool(getattr(info, "save_latest", True)))

    @property
    def folder(self) -> str:
        """The final folder."""
        return os.path.join(self.root, self.name)

    def inside(self, path: StrPath) -> str | None:
        """`path` relative to the final folder ("" for the folder itself); None where it lies elsewhere."""
        absolute = os.path.abspath(os.fspath(path))
        if absolute == self.folder:
            return ""
        return absolute[len(self.folder) + 1 :] if absolute.startswith(self.folder + "/") else None

    def is_for(self, info: Any) -> bool:
        """Whether `info` (or a bare tag) means this checkpoint."""
        given = getattr(info, "save_dir", None)
        return tag_of(info) == self.tag and (given is None or os.path.abspath(os.fspath(given)) == self.save_dir)
