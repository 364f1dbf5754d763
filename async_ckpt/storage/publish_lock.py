"""The right to take a committed tree's name away from it, for a replacement or a deletion.

A rename cannot be made to depend on what it renames. Without the lock, a deletion that was decided about one checkpoint
could move its replacement away, and a kill at that moment would lose a commit that had been reported.

Guarantees:
- While it is held, the name means the tree that was locked: everybody who renames a committed tree takes it first.
- It ends with its process, and is held for a rename only; nobody waits longer than `TIMEOUT_S` for it.
- Readers and commits of new tags never need one.

It is the lock of the tree's manifest: that of the directory may still be held by the writer that has just
published it, and perhaps stopped there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator

from ..format.names import MANIFEST_NAME
from .filesystem import FileSystem
from .private_dirs import NO_LOCKS

TIMEOUT_S = 10.0
_POLL_S = 0.002


@contextlib.contextmanager
def publish_lock(fs: FileSystem, final: str) -> Iterator[bool]:
    """Hold the lock of the checkpoint at `final`; gives False where the file system has no locks. Blocks, any thread.

    Raises:
        FileNotFoundError: there is none (any more).
        OSError: EBUSY when somebody else has held it for `TIMEOUT_S`; or the disk failed.
    """
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
