"""The directory that holds the checkpoints: made if it is missing, and looked at once."""

from __future__ import annotations

import contextlib
import logging
import os

from ..errors import report
from .filesystem import LOCAL_TYPES, FileSystem
from .write_error import write_error


def make_root(fs: FileSystem, root: str) -> None:
    """Make the root directory if it is missing, and make its own name durable. The mode of an existing root is kept.

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
        fs_type = fs.fs_type(root)
    except OSError as error:
        with contextlib.suppress(OSError):
            # Only what is empty, and was not there before; what cannot be removed is an empty directory.
            for path in reversed(made):
                fs.rmdir(path)
        raise write_error(fs, error, f"the checkpoint root {root!r} cannot be used", root) from error
    if fs_type and fs_type not in LOCAL_TYPES:
        report(logging.WARNING, "root %r is on %s: atomic and durable renames are not promised there", root, fs_type)
