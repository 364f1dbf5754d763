"""The directory that holds the checkpoints: made if it is missing, looked at once, and tried before anything is saved.

All functions block on the disk, and may run in any thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from ..errors import OutOfSpaceError, report
from .filesystem import LOCAL_TYPES, FileSystem
from .private_dirs import make_private, remove_tree
from .write_error import as_write_error, write_error

_CLONING_TYPES = frozenset({"xfs", "btrfs", "zfs", "bcachefs", "overlay"})
"""Local file systems that are worth asking."""
_GIVES_BLOCKS = frozenset({"ext4", "xfs", "btrfs"})
"""They do so with one call, unwritten; elsewhere the C library would write zeros."""


def make_root(fs: FileSystem, root: str, *, try_clones: bool = False) -> list[str]:
    """Make the root directory if it is missing, and make its own name durable. The mode of an existing root is kept.
    Returns the directories that were made, for `unmake`. With `try_clones`, finds out whether its files can share
    blocks. Raises WriteError: it cannot be made, or is not a directory."""
    path = root = os.path.abspath(root)
    missing: list[str] = []
    made: list[str] = []
    try:
        while fs.stat(path).kind == "missing" and os.path.dirname(path) != path:
            missing.append(path)
            path = os.path.dirname(path)
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                fs.mkdir(path)
                made.append(path)
            fs.fsync_dir(os.path.dirname(path))
        fs.listdir(root)
        if not missing:
            # A parent that may not be opened was there before us, with the root in it.
            with contextlib.suppress(PermissionError):
                fs.fsync_dir(os.path.join(root, os.pardir))
        kind = fs.root_types[root] = fs.fs_type(root)
    except OSError as error:
        unmake(fs, made)
        raise write_error(fs, error, f"the checkpoint root {root!r} cannot be used", root) from error
    if kind not in LOCAL_TYPES and not fs.findings.tried:
        _try_out(fs, root, kind or "an unknown file system")
    elif kind in _CLONING_TYPES and try_clones:
        # What it cannot do here, it is not asked for later.
        with contextlib.suppress(OSError), _folder_of_its_own(fs, root, "probe") as folder:
            fs.probe(folder, clones_only=True)
    return made


def unmake(fs: FileSystem, made: list[str]) -> None:
    """Remove what was made and is empty; what cannot be removed is an empty directory."""
    with contextlib.suppress(OSError):
        for path in reversed(made):
            fs.rmdir(path)


@contextlib.contextmanager
def _folder_of_its_own(fs: FileSystem, root: str, tag: str) -> Iterator[str]:
    folder = make_private(fs, root, tag)
    try:
        yield folder
    finally:
        remove_tree(fs, folder)


def _try_out(fs: FileSystem, root: str, kind: str) -> None:
    """Find out what the file system does that is not known to be local, and say so, in the log and as a warning."""
    try:
        with _folder_of_its_own(fs, root, "probe") as folder:
            fs.probe(folder)
        found = str(fs.findings) or "nothing else was found that is not as on a local disk"
    except OSError as error:
        found = f"it could not be tried out ({error})"
    message = f"root {root!r} is on {kind}: atomic and durable renames are not promised there; {found}"
    report(logging.WARNING, "%s", message)
    report(logging.WARNING, "%s", message, warning=RuntimeWarning, stacklevel=3)


def try_writing(fs: FileSystem, root: str) -> None:
    """Write and sync a file, rename its directory and sync the root, as a commit does; nothing of it stays. Raises
    WriteError, OutOfSpaceError: the disk refused one of these calls."""
    what = f"nothing can be saved in {root!r}, what is there is unchanged: a file could not be written and renamed"
    with as_write_error(fs, what, root):
        folder = make_private(fs, root, "preflight")
        try:
            fs.create_file(os.path.join(folder, "file"), b"preflight")
            fs.fsync_dir(folder)
            folder = make_private(fs, root, "preflight", "trash", folder)
            fs.fsync_dir(root)
        finally:
            remove_tree(fs, folder)


def check_room(fs: FileSystem, root: str, size_bytes: int, num_more: int) -> None:
    """Check that `num_more` checkpoints of that size find room. Where the file system gives blocks without writing
    them, one of them is asked for, and given back: that asks every quota. Raises OutOfSpaceError: the disk, or a quota,
    has less. WriteError: it cannot be asked."""
    what = f"a checkpoint has {size_bytes} bytes"
    if num_more > 1:
        what += f", and `retention` keeps so many that {num_more} more of them will be in {root!r} at once"
    with as_write_error(fs, f"{what}; nothing of it was written", root, needed_bytes=size_bytes):
        free_bytes, kind = fs.free_bytes(root), fs.fs_type(root)
        if free_bytes >= size_bytes * num_more:
            with _folder_of_its_own(fs, root, "preflight") as folder:
                fs.create_file(os.path.join(folder, "file"), b"preflight", size_bytes if kind in _GIVES_BLOCKS else 0)
            return
    raise OutOfSpaceError(
        f"{what}; {free_bytes} bytes are free: make room, or keep fewer. Nothing was written",
        path=root,
        needed_bytes=size_bytes * num_more,
        free_bytes=free_bytes,
    )
