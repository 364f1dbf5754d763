"""One committed checkpoint, held open: its manifest and its files; and which checkpoint a path lies in. No torch.

Guarantees:
- It is read through one directory descriptor; names are looked up in its manifest. Nothing else is opened, and below
  the checkpoint no link is followed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import CheckpointNotFoundError, CorruptCheckpointError, some_of
from ..format.manifest import FileEntry, Manifest
from ..format.names import MANIFEST_NAME, SINGLE_FILES_NAME, Root, StrPath, is_url
from ..storage.filesystem import DirHandle, ReadableFile, ReadSide
from .verified_file import MemorySource, VerifiedFile


def open_exact(
    directory: DirHandle | CommittedCheckpoint, entry: FileEntry, *, direct: bool, who: str = ""
) -> ReadableFile:
    """Open a file that is as its manifest entry says, as far as its size tells. Raises CorruptCheckpointError: it is
    not, in words that follow `who`."""
    try:
        file = directory.open_read(entry.parts, direct=direct)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{who}is missing", path=entry.path) from error
    if file.size_bytes == entry.size_bytes:
        return file
    file.close()
    what = f"{who}has {file.size_bytes} bytes, {entry.size_bytes} were committed"
    raise CorruptCheckpointError(what, path=entry.path)


class CommittedCheckpoint:
    """One committed checkpoint, held open: its files stay the same ones while others replace or delete the tag."""

    def __init__(
        self, filesystem: ReadSide, root: Root, manifest: Manifest, directory: DirHandle, copied_from: str | None = None
    ) -> None:
        self.root = root.path
        self.copied_from = copied_from
        """The tag that it was committed under, where it is a copy, was renamed, or is reached through a link."""
        self._paths = root
        self.manifest = manifest
        self.directory = directory
        self._filesystem = filesystem

    def entry(self, path: StrPath) -> FileEntry:
        """The entry of a file, given relative to the tag or as `<root>/<tag>/...`. Raises UnsafePathError: malformed.
        CheckpointNotFoundError: not in this checkpoint."""
        _, inner = self._paths.split_committed(path, tag=self.manifest.tag)
        entry = self.manifest.file(inner)
        if entry is None:
            there = some_of([known.path for known in self.manifest.files], show=repr) or "no files"
            raise CheckpointNotFoundError(f"checkpoint {self.manifest.tag!r} has no file {inner!r}; it has {there}")
        return entry

    def open_file(
        self, entry: FileEntry, *, check: bool = True, num_threads: int | None = None, lend: MemorySource | None = None
    ) -> VerifiedFile:
        """`open_raw`, to be read with its checksums (`check`)."""
        return VerifiedFile(self.open_raw(entry), entry, check=check, num_threads=num_threads, lend=lend)

    def open_raw(self, entry: FileEntry) -> ReadableFile:
        """Open a file of exactly the committed size, around the page cache. Raises CorruptCheckpointError: missing, not
        a regular file, or another size. CheckpointNotFoundError: the checkpoint was deleted or replaced meanwhile."""
        try:
            return open_exact(self, entry, direct=True, who=f"{entry.path!r} in checkpoint {self.manifest.tag!r} ")
        except CorruptCheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not self.is_current():
                raise gone(self.manifest.tag) from error
            raise

    def open_read(self, parts: Sequence[str], *, direct: bool = False) -> ReadableFile:
        """As `DirHandle.open_read`; the file of a single-file checkpoint is looked for where its manifest says, too."""
        try:
            within = (self.manifest.attempt,) if self.manifest.attempt else ()
            return self.directory.open_read((*within, *parts), direct=direct)
        except FileNotFoundError:
            home, name = os.path.split(self.root)
            beside = self.manifest.metadata.get("file")
            if name != SINGLE_FILES_NAME or not isinstance(beside, str):
                raise
            with contextlib.closing(self._filesystem.open_dir(home)) as folder:
                return folder.open_read((beside,), direct=direct)

    def is_current(self) -> bool:
        """Whether the tag still names this very directory."""
        return identity_of(self._filesystem, os.path.join(self.root, self.manifest.tag)) == self.directory.identity

    def close(self) -> None:
        """Close the directory; idempotent. Files opened from it stay open."""
        self.directory.close()

    def __enter__(self) -> CommittedCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(frozen=True)
class CatalogEntry:
    """One directory that looks like a checkpoint: a readable manifest, or what is wrong with it."""

    tag: str
    manifest: Manifest | None
    problem: str | None
    copied_from: str | None = None
    """The tag that it was committed under, where it is a copy, was renamed, or is reached through a link."""


def find_checkpoint(path: StrPath, filesystem: ReadSide) -> tuple[str, str, str] | None:
    """(root, tag, file) by the manifest nearest at or above `path`; the file is "" for a checkpoint itself. Blocks for
    lstat calls."""
    text = os.fspath(path)
    folder, name = text if is_url(text) else os.path.abspath(text), ""
    while True:
        above, tag = os.path.split(folder)
        if not tag or above.endswith(":"):
            return None
        # A link or FIFO in its place is damage, which whoever opens the checkpoint tells.
        if filesystem.stat(os.path.join(folder, MANIFEST_NAME)).kind != "missing":
            return above, tag, name
        folder, name = above, f"{tag}/{name}" if name else tag


def identity_of(filesystem: ReadSide, path: str) -> tuple[int, int]:
    """Device and inode of the directory that has this name, a link followed."""
    found = filesystem.stat(path)
    if found.kind != "other":
        return found.identity
    try:
        with contextlib.closing(filesystem.open_dir(path)) as directory:
            return directory.identity
    except OSError:
        # It leads nowhere (any more).
        return 0, 0


def gone(tag: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"checkpoint {tag!r} was deleted or replaced by another process while it was being read"
    )
