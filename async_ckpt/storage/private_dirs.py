"""Private names: directories under the root that are made, renamed to, locked and deleted; the right to make a
committed one private; files that take the place of another."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterator

from ..errors import CorruptCheckpointError
from ..format.manifest import MAX_MANIFEST_BYTES, Manifest, decode
from ..format.names import MANIFEST_NAME, NameKind, private_name
from .filesystem import FileLock, FileStat, FileSystem
from .syscalls import REFUSED

NO_LOCKS = REFUSED | {errno.ENOLCK}
_MAX_NAME_TRIES = 1000
TIMEOUT_S = 10.0
_POLL_S = 0.002

_numbers = itertools.count()


def make_private(fs: FileSystem, root: str, tag: str, kind: NameKind = "staging", src: str | None = None) -> str:
    """The path of a directory under a new private name: an empty one, or what has been at `src`."""
    for number in itertools.islice(_numbers, _MAX_NAME_TRIES):
        path = os.path.join(root, private_name(kind, tag, fs.owner(), number))
        with contextlib.suppress(FileExistsError):
            if src is None:
                fs.mkdir(path, private=True)
            else:
                fs.rename_noreplace(src, path)
            return path
    raise FileExistsError(f"no free {kind} name in {root!r}")


@contextlib.contextmanager
def replacing(fs: FileSystem, path: str, private: str) -> Iterator[None]:
    """Let what the block makes at `private`, and syncs, take the place of `path` in one rename, durably. Where either
    fails, what was at `path` stays, and `private` is removed."""
    try:
        yield
        fs.rename(private, path)
    except BaseException:
        with contextlib.suppress(OSError):
            fs.unlink(private)
        raise
    fs.fsync_dir(os.path.dirname(path))


def tree_of(fs: FileSystem, top: str, *, may_vanish: bool = False) -> list[tuple[str, FileStat]]:
    """All that lies below the directory `top`, by its path in there, folders before what is in them; no link is
    followed. With `may_vanish`, folders that others delete meanwhile are passed over."""
    found: list[tuple[str, FileStat]] = []
    folders, ignored = [""], (FileNotFoundError,) if may_vanish else ()
    for folder in folders:
        with contextlib.suppress(*ignored):
            for name in fs.listdir(os.path.join(top, folder) if folder else top):
                inner = os.path.join(folder, name)
                found.append((inner, fs.stat(os.path.join(top, inner))))
                folders += [inner] if found[-1][1].kind == "dir" else []
    return found


def manifest_in(fs: FileSystem, folder: str) -> Manifest | None:
    """The manifest of the checkpoint in `folder`; None where it is damaged. Raises OSError: there is none."""
    path = os.path.join(folder, MANIFEST_NAME)
    try:
        return decode(fs.read_file(path, MAX_MANIFEST_BYTES), source=path)
    except CorruptCheckpointError:
        return None


def link_aside(fs: FileSystem, root: str, tag: str, src: str) -> str:
    """A second tree of the same files under a private name, durable, where `src` itself cannot be renamed."""
    aside = make_private(fs, root, tag, "aside")
    inside = tree_of(fs, src)
    for inner, found in inside:
        if found.kind == "dir":
            fs.mkdir(os.path.join(aside, inner))
        else:
            fs.link(os.path.join(src, inner), os.path.join(aside, inner))
    fs.chmod(aside, fs.stat(src).mode)
    for inner, found in reversed(inside):
        if found.kind == "dir":
            fs.fsync_dir(os.path.join(aside, inner))
    for folder in (aside, root):
        fs.fsync_dir(folder)
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
    for inner, found in reversed(tree_of(fs, path, may_vanish=True)):
        with contextlib.suppress(FileNotFoundError):
            (fs.rmdir if found.kind == "dir" else fs.unlink)(os.path.join(path, inner))
    with contextlib.suppress(FileNotFoundError):
        fs.rmdir(path)


@contextlib.contextmanager
def publish_lock(fs: FileSystem, final: str) -> Iterator[bool]:
    """Hold the right to take a committed tree's name away from it, for a replacement or a deletion; gives False where
    the file system has no locks. Readers and commits of new tags never need it; it ends with its process.

    A rename cannot be made to depend on what it renames. Without the lock, a deletion that was decided about one
    checkpoint could move its replacement away, and a kill at that moment would lose a commit that had been reported.
    While it is held, the name means the tree that was locked: everybody who renames a committed tree takes it first.

    Raises:
        FileNotFoundError: there is no checkpoint at `final` (any more).
        OSError: EBUSY when somebody else has held it for `TIMEOUT_S`; or the disk failed.
    """
    # That of the directory may still be held by the writer that has just published it, and perhaps stopped there.
    path = os.path.join(final, MANIFEST_NAME)
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            lock = fs.lock(path)
        except OSError as error:
            # EBADF: NFS wants a descriptor that can write.
            if error.errno not in NO_LOCKS | {errno.EBADF}:
                raise
            break
        if lock is not None:
            with contextlib.closing(lock):
                # Another tree may have got the name meanwhile.
                if fs.findings.renumbers or fs.stat(path).identity == lock.identity:
                    yield True
                    return
        if time.monotonic() > deadline:
            told = f"another process has held it for {TIMEOUT_S:g} s to replace or delete it; is it stopped?"
            raise OSError(errno.EBUSY, told, final)
        time.sleep(_POLL_S)
    yield False
