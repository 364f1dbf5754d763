"""Private directories under the root: made, renamed to, locked and deleted. Shared by `transaction` and its sweep."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os

from ..format.names import MANIFEST_NAME, NameKind, PrivateName
from .filesystem import FileLock, FileSystem
from .syscalls import REFUSED

NO_LOCKS = REFUSED | {errno.ENOLCK}
_MAX_NAME_TRIES = 1000

_numbers = itertools.count()


def make_private(fs: FileSystem, root: str, tag: str, kind: NameKind = "staging", src: str | None = None) -> str:
    """The path of a directory under a new private name: an empty one, or what has been at `src`."""
    for number in itertools.islice(_numbers, _MAX_NAME_TRIES):
        path = os.path.join(root, str(PrivateName(kind, tag, fs.owner(), number)))
        with contextlib.suppress(FileExistsError):
            if src is None:
                fs.mkdir(path, private=True)
            else:
                fs.rename_noreplace(src, path)
            return path
    raise FileExistsError(f"no free {kind} name in {root!r}")


def move_aside(fs: FileSystem, root: str, tag: str, src: str, kind: NameKind) -> str:
    return make_private(fs, root, tag, kind, src)


def link_aside(fs: FileSystem, root: str, tag: str, src: str) -> str:
    """A second tree of the same files under a private name, durable, where `src` itself cannot be renamed."""
    aside = make_private(fs, root, tag, "aside")
    folders = [""]
    for folder in folders:
        for name in fs.listdir(os.path.join(src, folder)):
            inner = os.path.join(folder, name)
            if fs.stat(os.path.join(src, inner)).kind == "dir":
                fs.mkdir(os.path.join(aside, inner))
                folders.append(inner)
            else:
                fs.link(os.path.join(src, inner), os.path.join(aside, inner))
    fs.chmod(aside, fs.stat(src).mode)
    for folder in reversed(folders):
        fs.fsync_dir(os.path.join(aside, folder))
    fs.fsync_dir(root)
    return aside


def take_apart(fs: FileSystem, final: str) -> None:
    """Make a tree that cannot be renamed no checkpoint any more, durably and in one step; what is left of it is
    rubbish."""
    fs.unlink(os.path.join(final, MANIFEST_NAME))
    fs.fsync_dir(final)


def lock_or_none(fs: FileSystem, path: str) -> FileLock | None:
    """The lock, or None where the file system has none: then the owner in the name alone protects it."""
    try:
        return fs.lock(path)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None


def remove_tree(fs: FileSystem, path: str) -> None:
    """Delete a private tree; links are removed, never followed; what another sweeper deleted first is fine."""
    if fs.stat(path).kind == "other":
        fs.unlink(path)
        return
    folders = [path]
    for folder in folders:
        with contextlib.suppress(FileNotFoundError):
            for name in fs.listdir(folder):
                inner = os.path.join(folder, name)
                if fs.stat(inner).kind == "dir":
                    folders.append(inner)
                else:
                    with contextlib.suppress(FileNotFoundError):
                        fs.unlink(inner)
    for folder in reversed(folders):
        with contextlib.suppress(FileNotFoundError):
            fs.rmdir(folder)
