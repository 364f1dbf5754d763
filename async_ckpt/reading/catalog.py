"""What is committed under a root: list, find the newest good one, verify, open. Read-only, beside running writers.

Guarantees:
- Nothing is written, deleted, locked or swept; no thread outlives a call; torch is not imported.
- A checkpoint is read through one directory descriptor: replaced or deleted while it is being read, it is read whole
  in its old form, or again in its new one, or reported as gone. Bytes of two checkpoints are never mixed.
- What cannot be a checkpoint (a stray directory, a damaged manifest) is never listed.
- A checkpoint that was renamed, copied or is reached through a link is one, under the name that it has here.

Methods block on the disk and may be called from any thread.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from ..errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    UnsafePathError,
    check_int,
    report,
    some_of,
)
from ..format.manifest import MAX_MANIFEST_BYTES, Manifest, decode
from ..format.names import (
    MANIFEST_NAME,
    NameKind,
    Root,
    StrPath,
    check_existing_tag,
    check_tag,
    is_url,
    parse_private_name,
)
from ..host.process import OwnerState
from ..storage.filesystem import ReadSide, read_side_of
from ..threads.outcome import name_pending
from .committed import CommittedCheckpoint, Problem, Progress, VerifyReport, check_level, gone, identity_of
from .errors import DAMAGE_ERRNOS, ReadError
from .verified_file import MemorySource, VerifiedFile

_MAX_RACES = 32

T = TypeVar("T")


@dataclass(frozen=True)
class CatalogEntry:
    """One directory that looks like a checkpoint: a readable manifest, or what is wrong with it."""

    tag: str
    manifest: Manifest | None
    problem: str | None
    copied_from: str | None = None
    """The tag that it was committed under, where it is a copy, was renamed, or is reached through a link."""


@dataclass(frozen=True)
class StagingInfo:
    """A directory that is being written, deleted or replaced, or was left by a crash."""

    name: str
    kind: NameKind
    tag: str
    owner: str
    owner_state: OwnerState


class Catalog:
    """The checkpoints under one root; holds no state, so every call sees the disk as it is.

    A root that does not exist has no checkpoints. A relative one is resolved once, when the catalog is made.
    """

    def __init__(self, root: StrPath | Root, filesystem: ReadSide | None = None) -> None:
        self._paths = root if isinstance(root, Root) else Root(root)
        self.root = self._paths.path
        """The directory that holds the checkpoints."""
        self.filesystem = read_side_of(self.root) if filesystem is None else filesystem
        """What it reads through."""

    def tags(self) -> list[str]:
        """Committed tags, oldest commit first. Those with a damaged manifest are left out and logged."""
        return [entry.tag for entry in self._readable(self.entries())]

    def entries(self) -> list[CatalogEntry]:
        """Everything that looks like a checkpoint, oldest commit first; damaged ones first of all.

        Where retention deletes faster than this reads, it looks again: else all could be gone, and the newest not yet
        seen.
        """
        found: list[CatalogEntry | None] = []
        for _ in range(_MAX_RACES):
            found = self.filesystem.each(self._entry, self._names())
            if None not in found:
                break
        there = [entry for entry in found if entry is not None and entry.tag]
        return sorted(
            there, key=lambda e: (e.manifest.created_unix_ns if e.manifest else -1, e.copied_from is None, e.tag)
        )

    def committed(self) -> list[Manifest]:
        """The checkpoints that retention judges and mirrors get, oldest first: not those that somebody has copied,
        renamed or linked, to keep them."""
        return [entry.manifest for entry in self.entries() if entry.manifest is not None and entry.copied_from is None]

    def _entry(self, name: str) -> CatalogEntry | None:
        """What has this name; without a tag where that is no checkpoint, None where it has vanished meanwhile."""
        try:
            check_existing_tag(name)
            if self._looks_like_checkpoint(name):
                return self.read(
                    name, lambda found: CatalogEntry(found.manifest.tag, found.manifest, None, found.copied_from)
                )
        except CheckpointNotFoundError:
            return None
        except CorruptCheckpointError as error:
            return CatalogEntry(name, None, str(error))
        except UnsafePathError:
            return CatalogEntry("", None, None)
        # A directory that is no checkpoint is still there.
        is_there = self.filesystem.stat(os.path.join(self.root, name)).kind != "missing"
        return CatalogEntry("", None, None) if is_there else None

    def latest(self, verify: str = "full") -> str | None:
        """The newest committed tag that verifies to this level, or None; logs what was skipped, or is pending here.
        Raises OSError: a shortage of this machine (not damage) kept a checkpoint from being checked."""
        level = check_level(verify)
        name_pending(self.root)
        for _ in range(_MAX_RACES):
            vanished = False
            for entry in reversed(self._readable(self.entries())):
                try:
                    found = self.verify(entry.tag, level=level)
                except CheckpointNotFoundError:
                    vanished = True
                    continue
                if found.ok:
                    return entry.tag
                report(logging.WARNING, "latest: checkpoint %r is skipped: %s", entry.tag, found.problems[0])
            if not vanished:
                return None
        return None

    def verify(
        self, tag: str, *, level: str = "full", progress: Progress | None = None, num_threads: int | None = None
    ) -> VerifyReport:
        """Check every file of a checkpoint against its manifest. Raises CheckpointNotFoundError, UnsafePathError.
        OSError: a shortage of this machine (not damage) kept a file from being read."""
        checked = check_level(level)
        try:
            return self.read(tag, lambda found: found.verify(checked, num_threads, progress))
        except CorruptCheckpointError as error:
            return VerifyReport(tag, checked, 0, 0, (Problem(MANIFEST_NAME, str(error)),))

    def manifest(self, tag: str) -> Manifest:
        """What a checkpoint consists of, with its user metadata. Raises CheckpointNotFoundError,
        CorruptCheckpointError, UnsafePathError."""
        return self.read(tag, lambda checkpoint: checkpoint.manifest)

    def path(self, tag: str) -> Path:
        """The directory of a committed checkpoint. Raises CheckpointNotFoundError, UnsafePathError. ConfigError: it
        lies in a store, where there is no directory."""
        if self.filesystem.stat(os.path.join(self.root, check_existing_tag(tag), MANIFEST_NAME)).kind != "file":
            raise self._not_found(tag)
        if is_url(self.root):
            raise ConfigError(f"checkpoint {tag!r} lies in the store {self.root}, and in no directory")
        return Path(self.root, tag)

    def staging(self) -> list[StagingInfo]:
        """What is not committed: being written or deleted now, or left by a crash until an engine sweeps."""
        return [
            StagingInfo(it.name, it.kind, it.tag, str(it.owner), self.filesystem.owner_state(it.owner))
            for it in filter(None, map(parse_private_name, sorted(self._listdir())))
        ]

    def open(self, tag: str) -> CommittedCheckpoint:
        """Hold a checkpoint open for reading; use as a context manager. Raises CheckpointNotFoundError,
        CorruptCheckpointError (its manifest is damaged), UnsafePathError."""
        path = os.path.join(self.root, check_existing_tag(tag))
        for _ in range(_MAX_RACES):
            # The checkpoint itself may be reached through a link; nothing below it may.
            is_link = self.filesystem.stat(path).kind == "other"
            where = (path,) if is_link else (self.root, (tag,))
            identity = None
            try:
                directory = self.filesystem.open_dir(*where)
                identity = directory.identity
                with contextlib.ExitStack() as opened:
                    opened.callback(directory.close)
                    raw = directory.read_file((MANIFEST_NAME,), MAX_MANIFEST_BYTES)
                    manifest = decode(raw, source=os.path.join(path, MANIFEST_NAME))
                    opened.pop_all()
            except FileNotFoundError as error:
                if identity is None:
                    raise self._not_found(tag) from None
                if identity_of(self.filesystem, path) == identity:
                    raise CheckpointNotFoundError(f"{path!r} is not a checkpoint: it has no {MANIFEST_NAME}") from error
                # Deleted or replaced between the two steps: look again.
                continue
            except OSError as error:
                if error.errno not in DAMAGE_ERRNOS:
                    raise
                raise CorruptCheckpointError(f"{path!r} cannot be read: {error}", path=path) from error
            copied_from = manifest.tag if is_link or manifest.tag != tag else None
            return CommittedCheckpoint(self.filesystem, self._paths, replace(manifest, tag=tag), directory, copied_from)
        raise gone(tag)

    def open_file(
        self,
        tag: str,
        name: str,
        *,
        verify: str = "full",
        num_threads: int | None = None,
        lend: MemorySource | None = None,
    ) -> VerifiedFile:
        """Open file `name` of a checkpoint to read it; with `verify="full"` its checksums are compared as it is read.
        Raises CheckpointNotFoundError: no such tag or file; says what there is. CorruptCheckpointError: manifest or
        size is wrong. ConfigError, UnsafePathError: malformed arguments. ReadError: the disk failed."""
        check = check_level(verify) == "full"
        if num_threads is not None:
            check_int("num_threads", num_threads, 1, 256)

        def opened(checkpoint: CommittedCheckpoint) -> VerifiedFile:
            return checkpoint.open_file(checkpoint.entry(name), check=check, num_threads=num_threads, lend=lend)

        try:
            return self.read(tag, opened)
        except CheckpointError:
            raise
        except OSError as error:
            raise ReadError(error, path=f"{self.root}/{tag}/{name}") from error

    @contextlib.contextmanager
    def naming_older_ones(self, tag: str) -> Iterator[None]:
        """Let damage in a store pass with the names of older checkpoints there added: a new machine has no other place
        to look."""
        try:
            yield
        except CorruptCheckpointError as error:
            if not is_url(self.root):
                raise
            sources = {entry.tag: entry.copied_from for entry in self.entries() if entry.problem is None}
            told, older = error.args[0], list(sources)
            if sources.get(tag) is not None:
                # A manifest of another checkpoint says nothing of the age of this one.
                told = f"{told}: its manifest is that of {sources[tag]!r}"
                older.remove(tag)
            elif tag in sources:
                older = older[: older.index(tag)]
            error.args = (f"{told}; older ones in {self.root}: {', '.join(reversed(older[-5:])) or 'none'}",)
            raise

    def read(self, tag: str, function: Callable[[CommittedCheckpoint], T]) -> T:
        """`function` of the open checkpoint; run again when that was replaced under it (CheckpointNotFoundError)."""
        for _ in range(_MAX_RACES):
            with self.open(tag) as checkpoint:
                try:
                    return function(checkpoint)
                except CheckpointNotFoundError:
                    if checkpoint.is_current():
                        raise
        raise gone(tag)

    def _readable(self, entries: list[CatalogEntry]) -> list[CatalogEntry]:
        for entry in entries:
            if entry.problem is not None:
                report(logging.WARNING, "checkpoint %r is left out: %s", entry.tag, entry.problem)
        return [entry for entry in entries if entry.problem is None]

    def _names(self) -> list[str]:
        # A listing may miss a name that is being exchanged: list until two agree.
        names = set(self._listdir())
        for _ in range(4):
            again = set(self._listdir())
            if again == names:
                break
            names |= again
        return sorted(names)

    def _looks_like_checkpoint(self, name: str) -> bool:
        # A manifest that is a link or a FIFO is a damaged checkpoint, not a stray directory.
        try:
            return self.filesystem.stat(os.path.join(self.root, name, MANIFEST_NAME)).kind != "missing"
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            return False

    def _listdir(self) -> list[str]:
        try:
            return self.filesystem.listdir(self.root)
        except (FileNotFoundError, NotADirectoryError) as error:
            what = "is not a directory" if isinstance(error, NotADirectoryError) else "does not exist"
            raise CheckpointNotFoundError(f"{self.root!r} {what}: give the root that holds the checkpoints") from error

    def _not_found(self, tag: str) -> CheckpointNotFoundError:
        check_tag(tag)
        there = [name for name in sorted(self._listdir()) if not name.startswith(".")]
        shown = some_of(there, show=repr) or "nothing"
        return CheckpointNotFoundError(f"there is no checkpoint {tag!r} in {self.root!r}; there is {shown}")
