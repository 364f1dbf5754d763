"""The table of system calls behind `LocalFileSystem`: one method, one call, nothing decided here.

Linux has calls that Python does not offer (renameat2, statfs); they go through ctypes and raise
`OSError` like the rest. Where the C library lacks one, it fails with ENOSYS and the caller falls back.
All methods may block, release the GIL, and may be called from any thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import sys
from typing import Any

NOREPLACE = 1
EXCHANGE = 2
REFUSED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM})
"""How a file system or a sandbox refuses a call that can be done without. Where EPERM meant the file, the other way
meets it too."""
O_DIRECT: int = getattr(os, "O_DIRECT", 0)

_AT_FDCWD = -100
_MAGIC = {
    0xEF53: "ext4",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0xF2F52010: "f2fs",
    0x2FC12FC1: "zfs",
    0xCA451A4E: "bcachefs",
    0x794C7630: "overlay",
    0x6969: "nfs",
    0x65735546: "fuse",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
    0x01021997: "9p",
    0x0BD00BD0: "lustre",
    0x00C36400: "ceph",
    0x4D44: "vfat",
    0x2011BAB0: "exfat",
    0x47504653: "gpfs",
    0x19830326: "beegfs",
}


class Syscalls:
    """The calls of this machine; a subclass may record, refuse or shorten them."""

    def open(self, path: str, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        return os.open(path, flags, mode, dir_fd=dir_fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.pwrite(fd, buffer, offset)

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        return os.preadv(fd, [buffer], offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def ftruncate(self, fd: int, size_bytes: int) -> None:
        os.ftruncate(fd, size_bytes)

    def allocate(self, fd: int, size_bytes: int) -> None:
        os.posix_fallocate(fd, 0, size_bytes)

    def clear_direct(self, fd: int) -> None:
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_DIRECT)

    def mkdir(self, path: str, mode: int) -> None:
        os.mkdir(path, mode)

    def rmdir(self, path: str) -> None:
        os.rmdir(path)

    def unlink(self, path: str) -> None:
        os.unlink(path)

    def link(self, path: str, name: str) -> None:
        os.link(path, name, follow_symlinks=False)

    def rename(self, src: str, dst: str) -> None:
        os.rename(src, dst)

    def renameat2(self, src: str, dst: str, flags: int) -> None:
        call = getattr(_libc(), "renameat2", None)
        if call is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), src)
        _check(call(_AT_FDCWD, os.fsencode(src), _AT_FDCWD, os.fsencode(dst), ctypes.c_uint(flags)), src, dst)

    def chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

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

    def isdir(self, path: str) -> bool:
        return os.path.isdir(path)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def free_bytes(self, path: str) -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def fs_type(self, path: str) -> str:
        """Name of the type, "0x..." for one unknown here, "" where the system does not tell."""
        if not sys.platform.startswith("linux"):
            return ""
        # struct statfs begins with the type; its full size is below 256 bytes on every architecture.
        buffer = (ctypes.c_long * 32)()
        try:
            _check(_libc().statfs(os.fsencode(path), ctypes.byref(buffer)), path)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return ""
        magic = buffer[0] & 0xFFFFFFFF
        return _MAGIC.get(magic, hex(magic))


@functools.lru_cache(maxsize=1)
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _check(result: int, *paths: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        names: tuple[Any, ...] = (paths[0], None, paths[1]) if len(paths) > 1 else (paths[0],)
        raise OSError(code, os.strerror(code), *names)
