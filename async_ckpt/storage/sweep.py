"""What crashes leave behind, and its removal. See `transaction` for the names and the order of syncs."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import dataclass
from typing import Literal

from ..format.names import MANIFEST_NAME, PrivateName, parse_private_name
from ..host.process import OwnerState
from .filesystem import LOCAL_TYPES, FileSystem
from .private_dirs import NO_LOCKS, move_aside, remove_tree
from .write_error import write_error

UNDECIDED_AGE_S = 60.0
"""How old an unlocked staging directory must be to be swept when its owner cannot be looked up."""


@dataclass(frozen=True)
class Swept:
    """What `sweep` did with one left-over: "removed", "restored" (an old checkpoint got its name back) or "left"."""

    name: str
    tag: str
    action: Literal["removed", "restored", "left"]
    reason: str


def sweep(fs: FileSystem, root: str) -> list[Swept]:
    """Delete what dead processes left staged, and give a checkpoint back its name if its replacement was cut short.

    Touches only names that this package makes, only if the owner is certainly gone and the directory's lock is free.
    Where the owner cannot be looked up (another pid namespace), the lock must be free and the directory a minute
    old; another host's directories are always left. Being killed in here is harmless.

    Raises:
        WriteError: the root could not be listed or synced; nothing was deleted.
    """
    try:
        names = fs.listdir(root)
    except OSError as error:
        raise write_error(fs, error, "the checkpoint root could not be listed", root) from error
    results: list[Swept] = []
    doomed: list[tuple[PrivateName, str]] = []
    with contextlib.ExitStack() as locks:
        for name in sorted(names):
            parsed = parse_private_name(name)
            if parsed is not None:
                try:
                    results += _decide(fs, root, parsed, locks, doomed)
                except OSError as error:
                    results.append(Swept(name, parsed.tag, "left", str(error)))
        if doomed or any(swept.action == "restored" for swept in results):
            try:
                fs.fsync_dir(root)
            except OSError as error:
                raise write_error(fs, error, "the checkpoint root could not be synced; nothing was deleted", root) from error
        for parsed, path in doomed:
            try:
                remove_tree(fs, path)
                results.append(Swept(str(parsed), parsed.tag, "removed", "its owner is gone"))
            except OSError as error:
                results.append(Swept(str(parsed), parsed.tag, "left", str(error)))
    return results


def _decide(
    fs: FileSystem, root: str, parsed: PrivateName, locks: contextlib.ExitStack, doomed: list[tuple[PrivateName, str]]
) -> list[Swept]:
    """Decide about one left-over and take it out of everybody's way; returns what needs no deletion."""
    name, tag = str(parsed), parsed.tag
    path = os.path.join(root, name)
    found = fs.stat(path)
    if found.kind != "dir":
        return [] if found.kind == "missing" else [Swept(name, tag, "left", "it is not a directory")]
    owner_state = fs.owner_state(parsed.owner)
    if owner_state in (OwnerState.ALIVE, OwnerState.FOREIGN):
        return [Swept(name, tag, "left", f"its owner is {owner_state.value}")]
    decided = owner_state is OwnerState.DEAD or (owner_state is OwnerState.REBOOTED and fs.fs_type(root) in LOCAL_TYPES)
    if not decided and time.time() - found.mtime_ns / 1e9 < UNDECIDED_AGE_S:
        return [Swept(name, tag, "left", "its owner cannot be looked up, and it is younger than a minute")]
    try:
        lock = fs.lock_dir(path)
    except FileNotFoundError:
        return []
    except OSError as error:
        if error.errno not in NO_LOCKS or not decided:
            raise
    else:
        if lock is None:
            return [Swept(name, tag, "left", "it is locked: its owner, or a forked child of it, still holds it")]
        locks.callback(lock.close)
    if parsed.kind == "aside":
        with contextlib.suppress(FileExistsError):
            fs.rename_noreplace(path, os.path.join(root, tag))
            return [Swept(name, tag, "restored", "its replacement was never published")]
        if fs.stat(os.path.join(root, tag, MANIFEST_NAME)).kind == "missing":
            return [Swept(name, tag, "left", "it is a whole checkpoint, and what has its name now is none")]
    # A new name for trash too: the new entry rewrites what a failed sync of the root may have lost before.
    doomed.append((parsed, move_aside(fs, root, tag, path, "trash")))
    return []
