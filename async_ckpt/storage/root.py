"""The directory that holds the checkpoints: made if it is missing, and looked at once."""

from __future__ import annotations

import contextlib
import logging
import os

from ..errors import report
from .filesystem import LOCAL_TYPES, FileSystem
from .private_dirs import make_private, remove_tree
from .write_error import write_error

_CLONING_TYPES = frozenset({"xfs", "btrfs", "zfs", "bcachefs", "overlay"})
"""Of the local ones, those where it is worth asking."""


def make_root(fs: FileSystem, root: str, *, try_clones: bool = False) -> list[str]:
    """Make the root directory if it is missing, and make its own name durable. The mode of an existing root is kept.
    Returns the directories that were made, for `unmake`.

    Args:
        try_clones: find out whether its files can share blocks.

    Raises:
        WriteError: it cannot be made, or is not a directory.
    """
    root = os.path.abspath(root)
    missing: list[str] = []
    path = root
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
        kind = fs.fs_type(root)
    except OSError as error:
        unmake(fs, made)
        raise write_error(fs, error, f"the checkpoint root {root!r} cannot be used", root) from error
    if kind not in LOCAL_TYPES and not fs.findings.tried:
        _try_out(fs, root, kind or "an unknown file system")
    elif kind in _CLONING_TYPES and try_clones:
        # What it cannot do here, it is not asked for later.
        with contextlib.suppress(OSError):
            folder = make_private(fs, root, "probe")
            try:
                fs.probe_clones(folder)
            finally:
                remove_tree(fs, folder)
    return made


def unmake(fs: FileSystem, made: list[str]) -> None:
    """Remove what was made and is empty; what cannot be removed is an empty directory."""
    with contextlib.suppress(OSError):
        for path in reversed(made):
            fs.rmdir(path)


def _try_out(fs: FileSystem, root: str, kind: str) -> None:
    """Find out what the file system does that is not known to be local, and say so, in the log and as a warning."""
    try:
        folder = make_private(fs, root, "probe")
        try:
            fs.probe(folder)
        finally:
            remove_tree(fs, folder)
        found = str(fs.findings) or "nothing else was found that is not as on a local disk"
    except OSError as error:
        found = f"it could not be tried out ({error})"
    message = f"root {root!r} is on {kind}: atomic and durable renames are not promised there; {found}"
    report(logging.WARNING, "%s", message)
    report(logging.WARNING, "%s", message, warning=RuntimeWarning, stacklevel=3)
