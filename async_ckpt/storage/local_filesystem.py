"""The file system of this machine, behind the seam."""

from __future__ import annotations

import contextlib
import errno
import os
import stat as _stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor

from ..format.names import is_url
from ..host.process import Owner, OwnerState, current_owner, owner_state
from . import probe, read_file, write_file
from .filesystem import DirHandle, FileStat, LockHandle, R, ReadableFile, ReadSide, T, WritableFile
from .probe import OCCUPIED, Findings
from .syscalls import EXCHANGE, NOREPLACE, REFUSED, Syscalls


class LocalFileSystem:
    """The real one. It remembers its table of system calls, which tests replace, and what a `probe` has found."""

    def __init__(self, calls: Syscalls | None = None) -> None:
        self._calls = Syscalls() if calls is None else calls
        self._findings = Findings()

    def owner(self) -> Owner:
        return current_owner()

    def owner_state(self, owner: Owner) -> OwnerState:
        return owner_state(owner, self.owner())

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return [function(item) for item in items]

    def mkdir(self, path: str, *, private: bool = False) -> None:
        self._calls.mkdir(path, 0o700 if private else 0o777)

    def makedirs(self, path: str) -> None:
        if self._calls.isdir(path):
            return
        parent = os.path.dirname(path)
        if parent and parent != path:
            self.makedirs(parent)
        try:
            self.mkdir(path)
        except FileExistsError:
            if not self._calls.isdir(path):
                raise

    def listdir(self, path: str) -> list[str]:
        return self._calls.listdir(path)

    def stat(self, path: str) -> FileStat:
        try:
            found = self._calls.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return FileStat("missing", 0, 0, (0, 0), 0)
        kind = read_file.kind_of(found.st_mode)
        return FileStat(
            kind, found.st_size, _stat.S_IMODE(found.st_mode), (found.st_dev, found.st_ino), found.st_mtime_ns
        )

    def chmod(self, path: str, mode: int) -> None:
        self._calls.chmod(path, mode)

    def rename(self, src: str, dst: str) -> None:
        self._calls.rename(src, dst)

    def rename_noreplace(self, src: str, dst: str) -> None:
        try:
            self._calls.renameat2(src, dst, NOREPLACE)
        except OSError as error:
            if error.errno in OCCUPIED:
                # Not EEXIST: the flag was ignored, and the rename itself refused.
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), dst) from error
            if error.errno not in REFUSED:
                raise
            if self.stat(dst).kind != "missing":
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), dst) from error
            # A checkpoint is never an empty directory, so the kernel's own ENOTEMPTY closes the gap after the check.
            try:
                self._calls.rename(src, dst)
            except OSError as refused:
                if refused.errno in OCCUPIED | {errno.ENOTDIR}:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), dst) from refused
                raise

    def rename_exchange(self, a: str, b: str) -> None:
        self._calls.renameat2(a, b, EXCHANGE)

    def link(self, path: str, name: str) -> None:
        self._calls.link(path, name)

    def unlink(self, path: str) -> None:
        self._calls.unlink(path)

    def rmdir(self, path: str) -> None:
        self._calls.rmdir(path)

    def fsync_dir(self, path: str) -> None:
        fd = self._calls.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._calls.fsync(fd)
        except OSError as error:
            # How a file system says that it has no such call for directories: then names are durable when they are
            # made, or never.
            if error.errno != errno.EINVAL:
                raise
        finally:
            self._calls.close(fd)

    def create_file(self, path: str, data: bytes) -> None:
        write_file.create_file(self._calls, path, data)

    def read_file(self, path: str, max_bytes: int) -> bytes:
        folder, name = os.path.split(path)
        with read_file.open_directory(self._calls, folder or ".", ()) as handle:
            return handle.read_file((name,), max_bytes)

    def open_dir(self, root: str, parts: Sequence[str] = ()) -> DirHandle:
        return read_file.open_directory(self._calls, root, parts)

    def open_read(self, root: str, parts: Sequence[str], *, direct: bool = False) -> ReadableFile:
        with read_file.open_directory(self._calls, root, ()) as handle:
            return handle.open_read(parts, direct=direct)

    def lock_dir(self, path: str) -> LockHandle | None:
        return self._lock(path, os.O_DIRECTORY)

    def lock_file(self, path: str) -> LockHandle | None:
        # A FIFO in its place must not hang the open.
        return self._lock(path, os.O_NONBLOCK)

    def _lock(self, path: str, flags: int) -> LockHandle | None:
        fd = self._calls.open(path, flags | os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        lock = None
        try:
            if self._calls.flock(fd):
                lock = _Lock(self._calls, fd)
        finally:
            if lock is None:
                self._calls.close(fd)
        return lock

    @property
    def findings(self) -> Findings:
        return self._findings

    def probe(self, folder: str) -> None:
        self._findings = probe.probe(self._calls, folder)

    def free_bytes(self, path: str) -> int:
        return self._calls.free_bytes(path)

    def fs_type(self, path: str) -> str:
        return self._calls.fs_type(path)

    async def open_write(self, path: str, size_bytes: int, *, direct: bool, executor: Executor) -> WritableFile:
        # The padded end of a direct write must be cut off again.
        direct = direct and not self._findings.ignores_truncate
        return await write_file.open_write(self._calls, path, size_bytes, direct=direct, executor=executor)


class _Lock:
    """Unlocked by its own process only: a forked child shares the lock, must not drop it for its parent, nor keep it
    for it."""

    def __init__(self, calls: Syscalls, fd: int) -> None:
        found = calls.fstat(fd)
        self.identity = (found.st_dev, found.st_ino)
        self._pid = os.getpid()
        self._calls = calls
        self._fd: int | None = fd

    def close(self) -> None:
        fd, self._fd = self._fd, None
        # A descriptor that was never written through has nothing to lose when its close fails.
        with contextlib.suppress(OSError):
            if fd is not None:
                try:
                    if os.getpid() == self._pid:
                        self._calls.unlock(fd)
                finally:
                    self._calls.close(fd)


_openers: list[Callable[[str], ReadSide]] = []


def open_urls_with(opener: Callable[[str], ReadSide]) -> None:
    """Say who opens URLs (``s3://bucket/run``) for reading."""
    _openers[:] = [opener]


def read_side_of(path: str) -> ReadSide:
    """What a root, or a path in one, is read through.

    Raises:
        ConfigError: a URL that no mirror can have, or whose library is not installed.
    """
    return _openers[0](path) if is_url(path) else LocalFileSystem()
