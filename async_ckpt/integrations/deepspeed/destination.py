"""Where a DeepSpeed checkpoint goes, and what else is done there: other files are taken in, `latest` names it.

Guarantees:
- `latest` is written after the rename, by the rank that renamed, and never goes back to an older save of this engine.
- On every rank a commit succeeds only once `latest` is durable, so that whoever has waited may read it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...engine.interface import StrPath, tag_of
from ...errors import ConfigError, UnsafePathError
from ...format.manifest import FileEntry
from ...format.names import MANIFEST_NAME
from ...storage import transaction
from ...storage.filesystem import FileSystem
from ...storage.staged import Destination
from ...storage.write_error import write_error
from ...threads.locks import Lock
from ..adopting import adopt, read_entries
from .latest import write_latest

_OFFLOADED_NAME = "offloaded_tensors"
_STILL_USED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)


@dataclass
class SaveDirs:
    """What one engine has done in its save_dirs, and this process's place among the ranks."""

    rank: int
    world_size: int
    folder_name: str
    """DeepSpeed's name for the folder of this rank's offloaded tensors."""
    swept: set[str] = field(default_factory=set)
    newest: dict[str, int] = field(default_factory=dict)
    """Which save each `latest` names."""
    lock: Lock = field(default_factory=Lock)


@dataclass(frozen=True)
class DeepSpeedDestination(Destination):
    """One checkpoint: the folder `<root>/<tag>`, which DeepSpeed calls `<save_dir>/<full_tag>`.

    DeepSpeed's tags may hold "/": then the root of the checkpoint lies below `save_dir`. `ranks` are those that save
    under this tag, ascending: all of them, unless the training script has given its ranks different tags. `number`
    counts the engine's saves.
    """

    save_dir: str
    full_tag: str
    save_latest: bool
    ranks: tuple[int, ...]
    number: int
    dirs: SaveDirs

    @classmethod
    def of(
        cls, info: Any, save_dir: str | None, tags: Sequence[str], number: int, dirs: SaveDirs
    ) -> DeepSpeedDestination:
        """From a `CheckpointCommitInfo`, or from a bare tag and the engine's own `save_dir`; `tags` are those of all
        ranks.

        Raises:
            ConfigError: no save_dir is known. UnsafePathError: the tag leaves the save_dir, or is the manifest's name.
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
        if MANIFEST_NAME in full_tag.casefold().split("/"):
            raise UnsafePathError(
                f"tag {full_tag[:200]!a}: {MANIFEST_NAME!r} is a checkpoint's own; choose another tag"
            )
        root, name = os.path.split(folder)
        ranks = tuple(rank for rank, tag in enumerate(tags) if tag == full_tag)
        return cls(root, name, base, full_tag, bool(getattr(info, "save_latest", True)), ranks, number, dirs)

    @property
    def folder(self) -> str:
        return os.path.join(self.root, self.tag)

    def inside(self, path: StrPath) -> str | None:
        """`path` relative to the final folder ("" for the folder itself); None where it lies elsewhere."""
        absolute, folder = os.path.abspath(os.fspath(path)), self.folder
        if absolute == folder:
            return ""
        return absolute[len(folder) + 1 :] if absolute.startswith(folder + "/") else None

    def is_for(self, info: Any) -> bool:
        """Whether `info` (or a bare tag) means this checkpoint."""
        given = getattr(info, "save_dir", None)
        return tag_of(info) == self.full_tag and (given is None or os.path.abspath(os.fspath(given)) == self.save_dir)

    def prepare(self, filesystem: FileSystem, *, leads: bool, overwrite: str) -> None:
        """Make and sweep the directory when it is first used; let another tool's checkpoint be replaced as a whole."""
        if self.root not in self.dirs.swept:
            transaction.make_root(filesystem, self.root)
            if leads:
                transaction.sweep(filesystem, self.root)
            self.dirs.swept.add(self.root)
        if leads and overwrite == "replace":
            adopt(filesystem, self.root, self.tag)

    def loads_itself(self, path: str) -> bool:
        return True

    def take_in(self, filesystem: FileSystem, staging: str) -> Sequence[FileEntry]:
        """Move the NVMe-offloaded state, which DeepSpeed copied to the final folder past the engine.

        The emptied folders go too, so that the staging directory can take their name.
        """
        folder, name = self.folder, self.dirs.folder_name
        source = os.path.join(folder, _OFFLOADED_NAME, name)
        if filesystem.stat(source).kind != "dir":
            return ()
        try:
            filesystem.makedirs(os.path.join(staging, _OFFLOADED_NAME))
            filesystem.rename(source, os.path.join(staging, _OFFLOADED_NAME, name))
            for emptied in (os.path.dirname(source), folder):
                try:
                    filesystem.rmdir(emptied)
                except OSError as error:
                    # Other ranks' folders are still there: the last one to move its own removes it.
                    if error.errno not in _STILL_USED:
                        raise
            rank = self.dirs.rank if self.dirs.world_size > 1 else None
            return tuple(read_entries(filesystem, staging, f"{_OFFLOADED_NAME}/{name}", rank))
        except OSError as error:
            raise write_error(
                filesystem, error, f"offloaded tensors could not be moved to {staging!r}", source
            ) from error

    def published(self, filesystem: FileSystem) -> None:
        """Make `latest` name it. Of ranks with tags of their own rank 0 does so, as with stock DeepSpeed."""
        if not self.save_latest or (self.dirs.rank != 0 and len(self.ranks) < self.dirs.world_size):
            return
        with self.dirs.lock:
            # Commits may end in another order than they began.
            if self.number >= self.dirs.newest.get(self.save_dir, 0):
                write_latest(filesystem, self.save_dir, self.full_tag)
                self.dirs.newest[self.save_dir] = self.number
