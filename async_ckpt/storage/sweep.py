"""What crashes leave behind, and its removal. See `transaction` for the names and the order of syncs."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from dataclasses import dataclass
from typing import Literal

from ..format.names import MANIFEST_NAME, PrivateName, parse_private_name
from ..host.process import OwnerState
from .filesystem import LOCAL_TYPES, FileSystem
from .private_dirs import NO_LOCKS, make_private, remove_tree
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


def sweep(fs: FileSystem, root: str, *, only_own: bool = False) -> list[Swept]:
    """Delete what dead processes left staged, and give a checkpoint back its name if its replacement was cut short.

    Touches only names that this package makes, only if the owner is certainly gone and the directory's lock is free.
    Where the owner cannot be looked up (another pid namespace), the lock must be free and the directory a minute
    old; another host's directories are always left. Being killed in here is harmless. With `only_own`, looks only at
    the rubbish that this process itself could not delete before.

    Raises WriteError: the root could not be listed or synced; nothing was deleted.
    """
    try:
        names = fs.listdir(root)
    except OSError as error:
        raise write_error(fs, error, "the checkpoint root could not be listed", root) from error
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
                path = os.path.join(root, str(parsed))
                doomed.append((parsed, make_private(fs, root, parsed.tag, "trash", path)))
            except FileNotFoundError:
                # Another sweep was first.
                continue
            except OSError as error:
                results.append(Swept(str(parsed), parsed.tag, "left", str(error)))
        if doomed or any(swept.action == "restored" for swept in results):
            try:
                fs.fsync_dir(root)
            except OSError as error:
                what = "the checkpoint root could not be synced; nothing was deleted"
                raise write_error(fs, error, what, root) from error
        for parsed, path in doomed:
            try:
                remove_tree(fs, path)
                results.append(Swept(str(parsed), parsed.tag, "removed", "its owner is gone"))
            except OSError as error:
                results.append(Swept(str(parsed), parsed.tag, "left", str(error)))
    return results


def _decide(fs: FileSystem, root: str, parsed: PrivateName, locks: contextlib.ExitStack) -> Swept | None:
    """Decide about one left-over; None when it is to be deleted, and locked meanwhile."""
    path = os.path.join(root, str(parsed))

    def left(reason: str) -> Swept:
        return Swept(str(parsed), parsed.tag, "left", reason)

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
            return Swept(str(parsed), parsed.tag, "restored", "its replacement was never published")
        if fs.stat(os.path.join(root, parsed.tag, MANIFEST_NAME)).kind == "missing":
            return left("it is a whole checkpoint, and what has its name now is none")
    return None
