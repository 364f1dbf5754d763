"""The table of system calls that `FileSystem` is made of: one method, one call, nothing decided here.

Python does not offer renameat2: it goes through ctypes and raises `OSError` like the rest. Where the C library lacks
it, it fails with ENOSYS and the caller falls back.
All methods may block, release the GIL, and may be called from any thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import struct
from collections.abc import Callable
from typing import Any

from ..host.facts import mount_type

NOREPLACE = 1
EXCHANGE = 2
REFUSED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM})
"""How a file system or a sandbox refuses a call that can be done without. Where EPERM meant the file, the other way
meets it too."""
O_DIRECT: int = getattr(os, "O_DIRECT", 0)

_AT_FDCWD = -100
_FICLONERANGE = 0x4020940D


class Syscalls:
    """The calls of this machine; a subclass may record, refuse or shorten them."""

    close: Callable[[int], None] = staticmethod(os.close)
    pwrite: Callable[[int, memoryview, int], int] = staticmethod(os.pwrite)
    fsync: Callable[[int], None] = staticmethod(os.fsync)
    ftruncate: Callable[[int, int], None] = staticmethod(os.ftruncate)
    fstat: Callable[[int], os.stat_result] = staticmethod(os.fstat)
    rmdir: Callable[[str], None] = staticmethod(os.rmdir)
    unlink: Callable[[str], None] = staticmethod(os.unlink)
    rename: Callable[[str, str], None] = staticmethod(os.rename)
    chmod: Callable[[str, int], None] = staticmethod(os.chmod)
    isdir: Callable[[str], bool] = staticmethod(os.path.isdir)
    fs_type: Callable[[str], str] = staticmethod(mount_type)
    """As the mount table has it; "" where the system does not tell."""

    def open(self, path: str, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        return os.open(path, flags, mode, dir_fd=dir_fd)

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def allocate(self, fd: int, size_bytes: int, offset: int = 0) -> None:
        os.posix_fallocate(fd, offset, size_bytes)

    def clone_range(self, source: int, fd: int, offset: int, num_bytes: int) -> None:
        """Let `fd` share a range of the file `source`, at the same place."""
        fcntl.ioctl(fd, _FICLONERANGE, struct.pack("=qQQQ", source, offset, num_bytes, offset))

    def clear_direct(self, fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_DIRECT)

    def mkdir(self, path: str, *, private: bool = False) -> None:
        """0700 if private, else 0777 less the umask."""
        os.mkdir(path, 0o700 if private else 0o777)

    def link(self, path: str, name: str) -> None:
        os.link(path, name, follow_symlinks=False)

    def renameat2(self, src: str, dst: str, flags: int) -> None:
        call = getattr(_libc(), "renameat2", None)
        code = errno.ENOSYS
        if call is not None:
            if call(_AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), ctypes.c_uint(flags)) == 0:
                return
            code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), src, None, dst)

    def flock(self, fd: int) -> bool:
        """Whether the exclusive lock was free and is held now."""
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        return False

    def unlock(self, fd: int) -> None:
        """Drop the lock for everybody who shares the descriptor, forked children too."""
        fcntl.flock(fd, fcntl.LOCK_UN)

    def listdir(self, path: str | int) -> list[str]:
        return os.listdir(path)

    def lstat(self, path: str, *, dir_fd: int | None = None) -> os.stat_result:
        return os.stat(path, dir_fd=dir_fd, follow_symlinks=False)

    def free_bytes(self, path: str) -> int:
        """What this user may still write."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


@functools.lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
