"""What a root is tried for before anything is saved in it: one real write, and room. Nothing of it stays.

All functions block on the disk, and may run in any thread.
"""

from __future__ import annotations

import os

from ..errors import OutOfSpaceError
from .filesystem import FileSystem
from .private_dirs import make_private, move_aside, remove_tree
from .write_error import write_error

# With one call, unwritten; elsewhere the C library would write zeros.
_GIVES_BLOCKS = frozenset({"ext4", "xfs", "btrfs"})


def try_writing(fs: FileSystem, root: str) -> None:
    """Write and sync a file, rename its directory and sync the root, as a commit does.

    Raises:
        WriteError, OutOfSpaceError: the disk refused one of these calls, or to delete what was written.
    """
    try:
        folder = make_private(fs, root, "preflight")
        try:
            fs.create_file(os.path.join(folder, "file"), b"preflight")
            fs.fsync_dir(folder)
            folder = move_aside(fs, root, "preflight", folder, "trash")
            fs.fsync_dir(root)
        finally:
            remove_tree(fs, folder)
    except OSError as error:
        message = (
            f"nothing can be saved in {root!r}, what is there is unchanged: a file could not be written and renamed"
        )
        raise write_error(fs, error, message, root) from error


def check_room(fs: FileSystem, root: str, size_bytes: int, num_more: int) -> None:
    """Check that `num_more` checkpoints of that size find room. Where the file system gives blocks without writing
    them, one of them is asked for, and given back: that asks every quota.

    Raises:
        OutOfSpaceError: the disk, or a quota, has less. WriteError: it cannot be asked.
    """
    what = f"a checkpoint has {size_bytes} bytes"
    if num_more > 1:
        what += f", and `retention` keeps so many that {num_more} more of them will be in {root!r} at once"
    try:
        free_bytes, kind = fs.free_bytes(root), fs.fs_type(root)
        if free_bytes >= size_bytes * num_more:
            folder = make_private(fs, root, "preflight")
            try:
                fs.create_file(os.path.join(folder, "file"), b"preflight", size_bytes if kind in _GIVES_BLOCKS else 0)
            finally:
                remove_tree(fs, folder)
            return
    except OSError as error:
        raise write_error(fs, error, f"{what}; nothing of it was written", root, needed_bytes=size_bytes) from error
    raise OutOfSpaceError(
        f"{what}; {free_bytes} bytes are free: make room, or keep fewer. Nothing was written",
        path=root,
        needed_bytes=size_bytes * num_more,
        free_bytes=free_bytes,
    )
