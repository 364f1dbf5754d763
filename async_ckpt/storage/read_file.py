"""Reading side of `LocalFileSystem`: directories and regular files, opened without following anything."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..errors import CorruptCheckpointError
from .syscalls import O_DIRECT, Syscalls

if TYPE_CHECKING:
    from .filesystem import Kind

PAGE_BYTES = 4096
# O_NONBLOCK: opening a FIFO for reading would wait for a writer for ever; regular files ignore it.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def kind_of(mode: int) -> Kind:
    """The kind that a stat mode tells."""
    return "file" if stat.S_ISREG(mode) else "dir" if stat.S_ISDIR(mode) else "other"


class LocalReadableFile:
    """A regular file; in direct mode a second, buffered descriptor serves what is not aligned."""

    def __init__(self, calls: Syscalls, path: str, fd: int, direct_fd: int | None, size_bytes: int) -> None:
        self._calls = calls
        self._fd: int | None = fd
        self._direct_fd = direct_fd
        self._path = path
        self._size_bytes = size_bytes

    @property
    def path(self) -> str:
        return self._path

    @property
    def map_path(self) -> str:
        descriptors = "/proc/self/fd"
        return f"{descriptors}/{self._fd}" if self._fd is not None and self._calls.isdir(descriptors) else self._path

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        if self._fd is None:
            raise ValueError(f"{self._path} is closed")
        done = self._read_direct(buffer, offset, self._direct_fd) if self._direct_fd is not None else 0
        while done < buffer.nbytes:
            try:
                count = self._calls.pread_into(self._fd, buffer[done:], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                raise OSError(
                    error.errno, f"{error.strerror} (reading at offset {offset + done})", self._path
                ) from error
            if count == 0:
                raise CorruptCheckpointError(
                    f"{self._path} ends at byte {offset + done}, {buffer.nbytes - done} bytes too early",
                    path=self._path,
                )
            done += count

    def _read_direct(self, buffer: memoryview, offset: int, fd: int) -> int:
        """Read the aligned head; the caller reads what is left through the page cache."""
        whole = buffer.nbytes // PAGE_BYTES * PAGE_BYTES
        if offset % PAGE_BYTES or not whole:
            return 0
        try:
            count = self._calls.pread_into(fd, buffer[:whole], offset)
        except InterruptedError:
            return 0
        except OSError as error:
            if error.errno == errno.EINVAL:
                # Memory not aligned, or a file system that refuses late: the buffered descriptor does it.
                return 0
            raise OSError(error.errno, f"{error.strerror} (reading at offset {offset})", self._path) from error
        return count

    def close(self) -> None:
        fds = [fd for fd in (self._fd, self._direct_fd) if fd is not None]
        self._fd = self._direct_fd = None
        for fd in fds:
            _close(self._calls, fd)

    def __enter__(self) -> LocalReadableFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LocalDirHandle:
    """An open directory."""

    def __init__(self, calls: Syscalls, path: str, fd: int) -> None:
        self._calls = calls
        self._path = path
        self._fd: int | None = fd
        found = calls.fstat(fd)
        self._identity = (found.st_dev, found.st_ino)

    @property
    def path(self) -> str:
        return self._path

    @property
    def identity(self) -> tuple[int, int]:
        return self._identity

    def entries(self, parts: Sequence[str] = ()) -> list[tuple[str, Kind]]:
        with self._descend(parts) as (fd, _):
            found: list[tuple[str, Kind]] = []
            for name in self._calls.listdir(fd):
                # A name that vanished since the listing is simply not there.
                with contextlib.suppress(FileNotFoundError):
                    found.append((name, kind_of(self._calls.lstat(name, dir_fd=fd).st_mode)))
            return found

    def open_read(self, parts: Sequence[str], *, direct: bool = False) -> LocalReadableFile:
        with self._descend(parts[:-1]) as (parent, folder):
            path = os.path.join(folder, parts[-1])
            fd = self._open(parts[-1], _READ, parent, path)
            try:
                found = self._calls.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise CorruptCheckpointError(f"{path} is not a regular file; it was not read", path=path)
                direct_fd = (
                    self._open_direct(parts[-1], parent, (found.st_dev, found.st_ino)) if direct and O_DIRECT else None
                )
            except BaseException:
                self._calls.close(fd)
                raise
            return LocalReadableFile(self._calls, path, fd, direct_fd, found.st_size)

    def read_file(self, parts: Sequence[str], max_bytes: int) -> bytes:
        with self.open_read(parts) as file:
            if file.size_bytes > max_bytes:
                raise CorruptCheckpointError(
                    f"{file.path} has {file.size_bytes} bytes; at most {max_bytes} are read", path=file.path
                )
            data = bytearray(file.size_bytes)
            file.pread_into(memoryview(data), 0)
            return bytes(data)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            _close(self._calls, fd)

    def __enter__(self) -> LocalDirHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _descend(self, parts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """Open the sub-directory `parts`; gives (descriptor, path), closed afterwards unless it is our own."""
        if self._fd is None:
            raise ValueError(f"{self._path} is closed")
        fd, path = self._fd, self._path
        try:
            for part in parts:
                path = os.path.join(path, part)
                deeper = self._open(part, _DIRECTORY | os.O_NOFOLLOW, fd, path)
                previous, fd = fd, deeper
                if previous != self._fd:
                    _close(self._calls, previous)
            yield fd, path
        finally:
            if fd != self._fd:
                _close(self._calls, fd)

    def _open(self, name: str, flags: int, parent: int, path: str) -> int:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CorruptCheckpointError(f"{name!r} is not a file name", path=path)
        try:
            return self._calls.open(name, flags, dir_fd=parent)
        except OSError as error:
            # ELOOP: a link; ENOTDIR: a link or file where a directory should be; ENXIO: a socket or device.
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV):
                what = "a symbolic link" if error.errno == errno.ELOOP else "not a regular file or directory"
                raise CorruptCheckpointError(f"{path} is {what}; it was not opened", path=path) from error
            raise OSError(error.errno, error.strerror, path) from error

    def _open_direct(self, name: str, parent: int, identity: tuple[int, int]) -> int | None:
        try:
            fd = self._calls.open(name, _READ | O_DIRECT, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT, errno.ELOOP):
                return None
            raise
        found = self._calls.fstat(fd)
        if (found.st_dev, found.st_ino) == identity:
            return fd
        # The name passed to another file in between: stay with the one that is open.
        self._calls.close(fd)
        return None


def open_directory(calls: Syscalls, root: str, parts: Sequence[str]) -> LocalDirHandle:
    """Open `root`, then `parts` below it, following nothing below `root`."""
    handle = LocalDirHandle(calls, root, calls.open(root, _DIRECTORY))
    for part in parts:
        with handle:
            path = os.path.join(handle.path, part)
            handle = LocalDirHandle(calls, path, handle._open(part, _DIRECTORY | os.O_NOFOLLOW, _fd_of(handle), path))
    return handle


def _close(calls: Syscalls, fd: int) -> None:
    # Nothing was written through it, so nothing is lost when its close fails; raising would leak what was opened next.
    with contextlib.suppress(OSError):
        calls.close(fd)


def _fd_of(handle: LocalDirHandle) -> int:
    assert handle._fd is not None
    return handle._fd
