"""Deletions: of a committed checkpoint, never partly visible and never another one than was meant; and of what crashes
leave behind. See `transaction` for the names and the order of syncs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from dataclasses import dataclass
from typing import Literal

from ..errors import CheckpointNotFoundError
from ..format.manifest import Manifest
from ..format.names import MANIFEST_NAME, PrivateName, check_tag, parse_private_name
from ..host.process import OwnerState
from .filesystem import LOCAL_TYPES, FileSystem
from .private_dirs import NO_LOCKS, make_private, manifest_in, publish_lock, remove_tree, take_apart
from .write_error import as_write_error, write_error

UNDECIDED_AGE_S = 60.0
"""How old an unlocked staging directory must be to be swept when its owner cannot be looked up."""


def remove(fs: FileSystem, root: str, tag: str, *, expected: Manifest | None = None) -> None:
    """Delete a committed checkpoint: renamed away, root synced, then deleted. Of a link to one, only the link. With
    `expected`, only the checkpoint with this very manifest, and not one that has taken its name meanwhile.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint (any more); nothing was deleted.
        WriteError: a step failed; the checkpoint is whole under its name, or what is left of it has a private name.
    """
    final = os.path.join(root, check_tag(tag))
    try:
        kind = fs.stat(final).kind
        is_link = kind == "other" and expected is None and _leads_to_one(fs, final)
        if not is_link and (kind != "dir" or fs.stat(os.path.join(final, MANIFEST_NAME)).kind != "file"):
            raise CheckpointNotFoundError(f"there is no checkpoint {tag!r} in {root!r}; nothing was deleted")
        if is_link:
            # What it points to may be somebody else's. A directory that has taken its name meanwhile is refused.
            fs.unlink(final)
            fs.fsync_dir(root)
            return
        trash = _take_away(fs, root, tag, final, expected)
        fs.fsync_dir(root)
        remove_tree(fs, trash)
    except CheckpointNotFoundError:
        raise
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"checkpoint {tag!r} was deleted by another process") from error
    except OSError as error:
        raise write_error(fs, error, f"deleting checkpoint {tag!r} failed", final) from error


def _take_away(fs: FileSystem, root: str, tag: str, final: str, expected: Manifest | None) -> str:
    """Rename the tree to a private name of which nobody makes anything but rubbish; returns where it is."""
    with publish_lock(fs, final) as is_exclusive:
        identity = fs.stat(final).identity
        # Not the directory's identity: the number of a deleted directory is soon that of a new one.
        if expected is not None and manifest_in(fs, final) != expected:
            raise _replaced(tag)
        try:
            if is_exclusive:
                return make_private(fs, root, tag, "trash", final)
            aside = make_private(fs, root, tag, "aside", final)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # A directory in the lower layer of an overlay.
            take_apart(fs, final)
            return final
    # No locks here: look at what was moved before it counts as rubbish. A sweep gives an "aside" its name back.
    if fs.stat(aside).identity != identity:
        # Replaced between the look and the rename: give it its name back, unless a yet newer one has that already.
        with contextlib.suppress(FileExistsError):
            fs.rename_noreplace(aside, final)
            raise _replaced(tag)
    return make_private(fs, root, tag, "trash", aside)


def _leads_to_one(fs: FileSystem, link: str) -> bool:
    try:
        return manifest_in(fs, link) is not None
    except (FileNotFoundError, NotADirectoryError):
        return False


def _replaced(tag: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"checkpoint {tag!r} was replaced by another process; nothing was deleted")


@dataclass(frozen=True)
class Swept:
    """What `sweep` did with one left-over: "removed", "restored" (an old checkpoint got its name back) or "left"."""

    name: str
    tag: str
    action: Literal["removed", "restored", "left"]
    reason: str


def sweep(fs: FileSystem, root: str, *, only_own: bool = False) -> list[Swept]:
    """Delete what dead processes left staged, and give a checkpoint back its name if its replacement was cut short.

    Touches only names that this package makes, only if the owner is certainly gone and the directory's lock is free.
    Where the owner cannot be looked up (another pid namespace), the lock must be free and the directory a minute
    old; another host's directories are always left. Being killed in here is harmless. With `only_own`, looks only at
    the rubbish that this process itself could not delete before.

    Raises WriteError: the root could not be listed or synced; nothing was deleted.
    """
    with as_write_error(fs, "the checkpoint root could not be listed", root):
        names = fs.listdir(root)
    results: list[Swept] = []
    doomed: list[tuple[PrivateName, str]] = []
    with contextlib.ExitStack() as locks:
        for parsed in filter(None, map(parse_private_name, sorted(names))):
            if only_own and (parsed.kind, parsed.owner) != ("trash", fs.owner()):
                continue
            try:
                decided = None if only_own else _decide(fs, root, parsed, locks)
                if decided is not None:
                    results.append(decided)
                    continue
                # A new name for trash too: the new entry rewrites what a failed sync of the root may have lost before.
                path = os.path.join(root, parsed.name)
                doomed.append((parsed, make_private(fs, root, parsed.tag, "trash", path)))
            except FileNotFoundError:
                # Another sweep was first.
                continue
            except OSError as error:
                results.append(Swept(parsed.name, parsed.tag, "left", str(error)))
        if doomed or any(swept.action == "restored" for swept in results):
            with as_write_error(fs, "the checkpoint root could not be synced; nothing was deleted", root):
                fs.fsync_dir(root)
        for parsed, path in doomed:
            try:
                remove_tree(fs, path)
                results.append(Swept(parsed.name, parsed.tag, "removed", "its owner is gone"))
            except OSError as error:
                results.append(Swept(parsed.name, parsed.tag, "left", str(error)))
    return results


def _decide(fs: FileSystem, root: str, parsed: PrivateName, locks: contextlib.ExitStack) -> Swept | None:
    """Decide about one left-over; None when it is to be deleted, and locked meanwhile."""
    path = os.path.join(root, parsed.name)

    def left(reason: str) -> Swept:
        return Swept(parsed.name, parsed.tag, "left", reason)

    found = fs.stat(path)
    if found.kind == "missing":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if found.kind != "dir":
        return left("it is not a directory")
    owner_state = fs.owner_state(parsed.owner)
    if owner_state in (OwnerState.ALIVE, OwnerState.FOREIGN):
        return left(f"its owner is {owner_state.value}")
    is_rebooted = owner_state is OwnerState.REBOOTED
    is_gone = owner_state is OwnerState.DEAD or (is_rebooted and fs.fs_type(root) in LOCAL_TYPES)
    if not is_gone and time.time() - found.mtime_ns / 1e9 < UNDECIDED_AGE_S:
        return left("its owner cannot be looked up, and it is younger than a minute")
    try:
        lock = fs.lock(path)
    except OSError as error:
        if error.errno not in NO_LOCKS or not is_gone:
            raise
    else:
        if lock is None:
            return left("it is locked: its owner, or a forked child of it, still holds it")
        locks.callback(lock.close)
    if parsed.kind == "aside":
        with contextlib.suppress(FileExistsError):
            fs.rename_noreplace(path, os.path.join(root, parsed.tag))
            return Swept(parsed.name, parsed.tag, "restored", "its replacement was never published")
        if fs.stat(os.path.join(root, parsed.tag, MANIFEST_NAME)).kind == "missing":
            return left("it is a whole checkpoint, and what has its name now is none")
    return None
