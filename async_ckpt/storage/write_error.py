"""An `OSError` of the disk as one of the package's own errors."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

from ..errors import CheckpointError, OutOfSpaceError, WriteError
from .syscalls import Syscalls

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
MOMENTARY = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT})
"""What a disk may fail with once, and not again."""


def write_error(
    disk: Syscalls,
    error: OSError,
    message: str,
    path: str,
    *,
    offset: int | None = None,
    needed_bytes: int | None = None,
) -> WriteError:
    """The error to raise for `error`: an `OutOfSpaceError`, with what is free, where the disk or the quota is full. Its
    `message` says what is on disk now; a file's errors say what the whole file needs in `needed_bytes`."""
    if error.errno not in FULL:
        return WriteError(f"{message} ({error})", errno=error.errno, path=path, offset=offset)
    free_bytes = _free_bytes(disk, path)
    needed = "" if needed_bytes is None else f", the file needs {needed_bytes} bytes"
    free = "" if free_bytes is None else f", {free_bytes} bytes are free"
    full = "the quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
    return OutOfSpaceError(
        f"{message}: {full}{needed}{free}: make room, or keep fewer",
        errno=error.errno,
        path=path,
        offset=offset,
        needed_bytes=needed_bytes,
        free_bytes=free_bytes,
    )


@contextlib.contextmanager
def as_write_error(
    disk: Syscalls, message: str, path: str, *, offset: int | None = None, needed_bytes: int | None = None
) -> Iterator[None]:
    """Raise what the disk refuses in the block as `write_error` makes it. Other errors of our tree pass."""
    try:
        yield
    except OSError as error:
        if isinstance(error, CheckpointError) and not isinstance(error, WriteError):
            raise
        raise write_error(disk, error, message, path, offset=offset, needed_bytes=needed_bytes) from error


def _free_bytes(disk: Syscalls, path: str) -> int | None:
    """What is free where `path` is or was to be: at the nearest directory above it that is there."""
    while (above := os.path.dirname(path)) != path:
        with contextlib.suppress(OSError):
            return disk.free_bytes(above or ".")
        path = above
    return None
