"""What a file system really does that is not known to be local: five calls, tried once in a directory of one's own."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass

from ..host.memory import PAGE_BYTES
from .syscalls import NOREPLACE, O_DIRECT, REFUSED, Syscalls

CANNOT_CLONE = REFUSED | {errno.ENOTTY, errno.EXDEV}
"""How a file system or a sandbox says that it never clones."""
_CLONED_BYTES = 64 << 10
OCCUPIED = frozenset({errno.EEXIST, errno.ENOTEMPTY})
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True)
class Findings:
    """Where a file system is not as a local one; all False where nothing was found, or nothing was tried."""

    tried: bool = False
    replaces: bool = False
    """A rename puts a directory in the place of one that is not empty."""
    refuses_noreplace: bool = False
    ignores_truncate: bool = False
    refuses_direct: bool = False
    renumbers: bool = False
    """A file has another number after a rename, or each time that it is looked at."""
    clones: bool = False
    """Files can share blocks."""

    def __str__(self) -> str:
        told = {
            "a rename replaces a directory that is not empty: only one writer may have a tag at a time": self.replaces,
            "no rename refuses a taken name (RENAME_NOREPLACE): it is looked at before": self.refuses_noreplace,
            "files cannot be shortened, so direct I/O is not used": self.ignores_truncate,
            "direct I/O is refused": self.refuses_direct,
            "files change their numbers, so what fails half way may stay until a later sweep": self.renumbers,
        }
        return "; ".join(text for text, is_so in told.items() if is_so)


def probe(calls: Syscalls, folder: str) -> Findings:
    """Try the calls in the empty private directory `folder`, which the caller deletes afterwards. Raises OSError: it
    refuses what every file system can."""
    first, second, third, file, renamed = (
        os.path.join(folder, name) for name in ("first", "second", "third", "file", "renamed")
    )
    for path in (first, second):
        calls.mkdir(path, private=True)
    calls.close(calls.open(os.path.join(second, "inner"), _NEW))
    replaces = _can(lambda: calls.rename(first, second), OCCUPIED)
    # A free name: that it is taken, the kernel of this machine would say by itself, whatever another machine does
    # meanwhile.
    refuses_noreplace = not _can(lambda: calls.renameat2(second, third, NOREPLACE), REFUSED)
    fd = calls.open(file, _NEW)
    try:
        calls.pwrite(fd, memoryview(bytes(PAGE_BYTES)), 0)
        calls.ftruncate(fd, 1)
        ignores_truncate = calls.fstat(fd).st_size != 1
    finally:
        calls.close(fd)
    number = calls.lstat(file).st_ino
    calls.rename(file, renamed)
    renumbers = calls.lstat(renamed).st_ino != number
    refuses_direct = not _can(lambda: _write_direct(calls, renamed), REFUSED)
    clones = can_clone(calls, folder)
    return Findings(True, replaces, refuses_noreplace, ignores_truncate, refuses_direct, renumbers, clones)


def can_clone(calls: Syscalls, folder: str) -> bool:
    """Whether files can share blocks; tried with two new files in `folder`."""
    fds: list[int] = []
    try:
        fds.extend(calls.open(os.path.join(folder, name), _NEW) for name in ("source", "clone"))
        calls.pwrite(fds[0], memoryview(bytes(_CLONED_BYTES)), 0)
        return _can(lambda: calls.clone_range(fds[0], fds[1], 0, _CLONED_BYTES), CANNOT_CLONE)
    finally:
        for fd in fds:
            calls.close(fd)


def _can(call: Callable[[], None], refusals: frozenset[int]) -> bool:
    """Whether it succeeds, and does not fail in one of these ways."""
    try:
        call()
    except OSError as error:
        if error.errno not in refusals:
            raise
        return False
    return True


def _write_direct(calls: Syscalls, path: str) -> None:
    fd = calls.open(path, os.O_WRONLY | O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        calls.pwrite(fd, memoryview(mmap.mmap(-1, PAGE_BYTES)), 0)
    finally:
        calls.close(fd)
