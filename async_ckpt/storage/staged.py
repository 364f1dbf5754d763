"""A staging directory, how far its checkpoint has come, and the one rename of its commit: onto a free name, in exchange
for the old checkpoint, or in two steps where neither can be had.

What other code writes into a checkpoint's folder while that is on its way (a callback's adapter, a tokenizer, notes) is
no obstacle where checkpoints may be replaced: it stays in the folder, as files that no manifest lists, whether the
folder was new or held the checkpoint that is replaced.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, ClassVar, NoReturn, Protocol

from ..errors import CommitError, TagExistsError, report
from ..format.manifest import FileEntry
from ..format.names import MANIFEST_NAME
from ..metrics import OnStep
from ..threads.locks import Lock
from .filesystem import FileLock, FileSystem
from .private_dirs import link_aside, make_private, manifest_in, publish_lock, remove_tree, take_apart, tree_of
from .syscalls import REFUSED
from .write_error import MOMENTARY

_MAX_RACES = 16
# ENOTEMPTY, EEXIST: the flag was ignored. EXDEV: a directory in the lower layer of an overlay.
_CANNOT_EXCHANGE = REFUSED | {errno.ENOTEMPTY, errno.EEXIST, errno.EXDEV}


class State(enum.Enum):
    """A checkpoint's life, in order. ABORTED is reached from every state before COMMITTED."""

    OPEN = "open"
    SEALED = "sealed"
    DURABLE = "durable"
    """Every byte and name below the staging directory is synced; only the rename is missing."""
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint goes: the directory `tag` below `root`. Integrations add what they know of it, and what they
    do there besides. What a hook raises fails the checkpoint on all ranks."""

    root: str
    tag: str
    loads_itself: ClassVar[re.Pattern[str] | None] = None
    """The names of files that a framework loads again in its own way: nobody is told what `load` refuses of them, as
    there is nothing that a user could do about it."""

    def prepare(self, filesystem: FileSystem, *, leads: bool, overwrite: str) -> None:
        """Called before anything is staged; `leads` on the rank that makes the directory. Training thread."""

    def take_in(self, filesystem: FileSystem, staging: str) -> Sequence[FileEntry]:
        """Files that this rank adds to the staging directory by itself, durable. Called once its others are. Worker
        thread; blocks."""
        return ()

    @property
    def vote(self) -> str:
        """What this rank tells the one that renames when its part is durable: a few words, the same from all ranks or
        not."""
        return ""

    def check_votes(self, votes: Sequence[str]) -> None:
        """Called on rank 0 before the decision, with the votes of all ranks that share its directory."""

    def published(self, filesystem: FileSystem) -> None:
        """Called on the rank that has renamed, before any rank reports success. Worker thread; blocks."""


class SharedFile(Protocol):
    """A file of a staging directory that several ranks write, each a share of it. Worker thread; blocks."""

    def tell(self) -> dict[str, Any]:
        """What this rank tells of its share, which is durable: JSON values."""

    def finish(self, filesystem: FileSystem, staging: str, told: Mapping[int, dict[str, Any]]) -> FileEntry:
        """Called on the rank that renames, with what all tell, by rank: make the file whole, and durable. Raises
        RankFailedError: the ranks do not agree on it."""


@dataclass(eq=False)
class Staging:
    """A checkpoint's staging directory, which holds its files until `publish`, and the checkpoint's state."""

    destination: Destination
    overwrite: str = "refuse"
    tag: str = field(init=False)
    """Its name once it is visible."""
    rewrites: bool = False
    """Whether a small file that fails for a moment is written once more."""
    root: str = field(init=False)
    """The destination's root, absolute."""
    final_path: str = field(init=False)
    """Where the checkpoint will be."""
    location: Future[str] = field(default_factory=Future, repr=False)
    """Resolves to the directory's path: for one of several ranks, when rank 0 has made it."""
    identity: tuple[int, int] | None = None
    """The directory's; None while there is none, and where another process has made it, which renames or removes it."""
    begun_ns: int = 0
    """When the directory was made, by the clock of its file system."""
    lock: FileLock | None = None
    state: State = State.OPEN
    renamed: bool = False
    """The tree has left `path`; what is there now, if anything, is the replaced checkpoint."""
    given_up: bool = False
    """`abort` was called; a publish that has not renamed yet must not."""
    shared: dict[str, SharedFile] = field(default_factory=dict)
    """By path, what several ranks write."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """What the manifest tells of how long it took."""
    on_step: OnStep | None = field(default=None, repr=False)
    """Told about the steps of `publish`, on its thread."""
    turn: Lock = field(default_factory=Lock, repr=False, compare=False)
    """Held by `publish` and `abort`: a deletion by path must never meet what an exchange has just put there."""

    def __post_init__(self) -> None:
        self.tag, self.root = self.destination.tag, os.path.abspath(self.destination.root)
        self.final_path = os.path.join(self.root, self.tag)

    @property
    def path(self) -> str:
        """Where it is; blocks until that is known."""
        return self.location.result()


def create_file(fs: FileSystem, staging: Staging, name: str, data: bytes) -> None:
    """A small new file of the staging directory, as `FileSystem.create_file`; once more where that may help."""
    path = os.path.join(staging.path, name)
    try:
        fs.create_file(path, data)
    except OSError as error:
        if not staging.rewrites or error.errno not in MOMENTARY:
            raise
        with contextlib.suppress(FileNotFoundError):
            fs.unlink(path)
        fs.create_file(path, data)


def refuse(staging: Staging, why: str) -> NoReturn:
    """Say why it is not committed, by a CommitError."""
    raise CommitError(f"{why}; tag {staging.tag!r} was not committed", step="manifest", path=staging.path)


def rename_to_final(fs: FileSystem, staging: Staging) -> list[str]:
    """Give the staged tree its final name; returns where the replaced trees are now. Raises TagExistsError: somebody
    else has the tag, and `overwrite` is "refuse". CommitError, OSError: nothing was renamed."""
    for _ in range(_MAX_RACES):
        try:
            fs.rename_noreplace(staging.path, staging.final_path)
            return []
        except FileExistsError:
            if _joins_additions(fs, staging):
                return [staging.path]
            check_final(fs, staging, step="rename")
        if fs.findings.replaces:
            return _replace_without_exchange(fs, staging)
        try:
            with publish_lock(fs, staging.final_path):
                fs.rename_exchange(staging.path, staging.final_path)
            return [staging.path]
        except FileNotFoundError:
            # Deleted in between: then there is nothing to replace. Unless our own side is what is missing.
            if fs.stat(staging.path).kind == "missing":
                raise
        except OSError as error:
            if error.errno not in _CANNOT_EXCHANGE:
                raise
            return _replace_without_exchange(fs, staging)
    refuse(staging, f"other processes kept creating and deleting {staging.final_path!r}")


def _joins_additions(fs: FileSystem, staging: Staging) -> bool:
    """Where `overwrite` allows it, take the name of a folder that other code has made since `begin`. Whoever goes on
    writing there finds the folders that he has made, but for one made at this very moment, until it was moved."""
    staged, final = staging.path, staging.final_path
    if staging.overwrite == "refuse" or fs.findings.replaces or not _holds_only_additions(fs, final):
        return False
    try:
        for inner, found in tree_of(fs, final, may_vanish=True):
            if found.kind == "dir":
                fs.makedirs(os.path.join(staged, inner))
        fs.rename_exchange(staged, final)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return False
    move_additions(fs, staging, staged)
    return True


def _holds_only_additions(fs: FileSystem, folder: str) -> bool:
    return fs.stat(folder).kind == "dir" and fs.stat(os.path.join(folder, MANIFEST_NAME)).kind == "missing"


def move_additions(fs: FileSystem, staging: Staging, old: str) -> None:
    """Give the committed checkpoint what other code has added to the folder that it has replaced, now at `old`: all,
    where that was no checkpoint, and else what was written since `begin` and is none of its files. A process that is
    killed in between loses what was not moved."""
    final = staging.final_path
    added = {inner: there.mtime_ns for inner, there in tree_of(fs, old) if there.kind != "dir"}
    if not _holds_only_additions(fs, old):
        added = {inner: written_ns for inner, written_ns in added.items() if written_ns >= staging.begun_ns}
        manifest = manifest_in(fs, old) if added else None
        # Where it is damaged, all that is there may be the checkpoint's own.
        listed = set(added) if manifest is None else {MANIFEST_NAME, *(entry.path for entry in manifest.files)}
        added = {inner: written_ns for inner, written_ns in added.items() if inner not in listed}
    given_way = []
    for inner in added:
        target = os.path.join(final, inner)
        if fs.stat(target).kind == "missing":
            fs.makedirs(os.path.dirname(target))
            fs.rename(os.path.join(old, inner), target)
        else:
            given_way.append(inner)
    if given_way:
        told = "%s: %s and %d others, written there before the commit by other code, gave way to what was saved"
        report(logging.WARNING, told, final, given_way[0], len(given_way) - 1)


def _replace_without_exchange(fs: FileSystem, staging: Staging) -> list[str]:
    """Two renames; between them the tag is absent, and `sweep` gives the old tree its name back."""
    aside: list[str] = []
    for _ in range(_MAX_RACES):
        with contextlib.suppress(FileNotFoundError), publish_lock(fs, staging.final_path):
            aside.append(_set_aside(fs, staging))
        try:
            fs.rename_noreplace(staging.path, staging.final_path)
            return aside
        except FileExistsError:
            # Another writer used the gap: its checkpoint is the one to replace now.
            continue
        except OSError as error:
            if not aside:
                raise
            try:
                fs.rename_noreplace(aside[-1], staging.final_path)
            except OSError as second:
                raise CommitError(
                    f"{error}; and the old checkpoint could not be given its name back ({second}): it is whole "
                    f"at {aside[-1]!r}",
                    step="rename",
                    errno=error.errno,
                    path=aside[-1],
                ) from error
            raise
    refuse(staging, f"other processes kept creating {staging.final_path!r}")


def _set_aside(fs: FileSystem, staging: Staging) -> str:
    """Take the name from the old tree, which stays whole under the private name that is returned."""
    try:
        return make_private(fs, staging.root, staging.tag, "aside", staging.final_path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    # A directory in the lower layer of an overlay.
    aside = link_aside(fs, staging.root, staging.tag, staging.final_path)
    try:
        take_apart(fs, staging.final_path)
        remove_tree(fs, staging.final_path)
    except OSError as error:
        told = f"{error}; the old checkpoint is whole at {aside!r}, tag {staging.tag!r} was not committed"
        raise CommitError(told, step="rename", errno=error.errno, path=aside) from error
    return aside


def check_final(fs: FileSystem, staging: Staging, *, step: str) -> None:
    """Refuse what `overwrite` does not allow to be replaced. Raises TagExistsError: the tag is committed and
    `overwrite` is "refuse", or what is there is no checkpoint."""
    final = staging.final_path
    if fs.stat(final).kind == "missing":
        return
    if staging.overwrite == "refuse":
        raise TagExistsError(
            f"tag {staging.tag!r} exists already and was left as it is; choose another tag or overwrite='replace'",
            step=step,
            path=final,
        )
    is_checkpoint = fs.stat(os.path.join(final, MANIFEST_NAME)).kind == "file" and fs.stat(final).kind == "dir"
    if not is_checkpoint and fs.stat(final).kind != "missing":
        raise TagExistsError(
            f"{final!r} is not a checkpoint (it has no {MANIFEST_NAME}) and is not replaced", step=step, path=final
        )
