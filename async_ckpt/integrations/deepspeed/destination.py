"""Where a DeepSpeed checkpoint goes: from what DeepSpeed says to a checkpoint root and a tag. Plain data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...engine.interface import StrPath, tag_of
from ...errors import ConfigError, UnsafePathError
from ...ranks.coordinator import Destination


@dataclass(frozen=True)
class DeepSpeedDestination(Destination):
    """One checkpoint: the folder `<root>/<tag>`, which DeepSpeed calls `<save_dir>/<full_tag>`.

    DeepSpeed's tags may hold "/": then the root of the checkpoint lies below `save_dir`. `ranks` are those that save
    under this tag, ascending: all of them, unless the training script has given its ranks different tags.
    """

    save_dir: str
    full_tag: str
    save_latest: bool
    ranks: tuple[int, ...]

    @classmethod
    def of(cls, info: Any, save_dir: str | None, tags: Sequence[str]) -> DeepSpeedDestination:
        """From a `CheckpointCommitInfo`, or from a bare tag and the engine's own `save_dir`; `tags` are those of all
        ranks.

        Raises:
            ConfigError: no save_dir is known. UnsafePathError: the tag leaves the save_dir.
        """
        given = getattr(info, "save_dir", save_dir)
        if given is None:
            raise ConfigError(
                "a bare tag needs save_dir: give it to AsyncDeepSpeedEngine, or pass a CheckpointCommitInfo"
            )
        base, full_tag = os.path.abspath(os.fspath(given)), tag_of(info)
        folder = os.path.normpath(os.path.join(base, full_tag))
        if not folder.startswith(base.rstrip("/") + "/"):
            raise UnsafePathError(f"tag {full_tag[:200]!a} leaves the save_dir {base!r}; nothing was touched")
        root, name = os.path.split(folder)
        ranks = tuple(rank for rank, tag in enumerate(tags) if tag == full_tag)
        return cls(root, name, base, full_tag, bool(getattr(info, "save_latest", True)), ranks)

    @property
    def folder(self) -> str:
        """The final folder."""
        return os.path.join(self.root, self.tag)

    def inside(self, path: StrPath) -> str | None:
        """`path` relative to the final folder ("" for the folder itself); None where it lies elsewhere."""
        absolute = os.path.abspath(os.fspath(path))
        if absolute == self.folder:
            return ""
        return absolute[len(self.folder) + 1 :] if absolute.startswith(self.folder + "/") else None

    def is_for(self, info: Any) -> bool:
        """Whether `info` (or a bare tag) means this checkpoint."""
        given = getattr(info, "save_dir", None)
        return tag_of(info) == self.full_tag and (given is None or os.path.abspath(os.fspath(given)) == self.save_dir)
