"""Reading side of `FileSystem`: directories and regular files, opened without following anything."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Literal

from ..errors import CorruptCheckpointError
from ..host.memory import PAGE_BYTES
from .syscalls import O_DIRECT, Syscalls

Kind = Literal["file", "dir", "other", "missing"]

# O_NONBLOCK: opening a FIFO for reading would wait for a writer for ever; regular files ignore it.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def kind_of(mode: int) -> Kind:
    """The kind that a stat mode tells."""
    return "file" if stat.S_ISREG(mode) else "dir" if stat.S_ISDIR(mode) else "other"


Stamp = tuple[int, int, int, int]


def stamp_of(found: os.stat_result) -> Stamp:
    """Equal for one file as long as nothing was written to it: device, inode, size, time of the last change."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class LocalReadableFile:
    """A regular file; in direct mode a second, buffered descriptor serves what is not aligned."""

    def __init__(self, calls: Syscalls, path: str, fd: int, direct_fd: int | None, found: os.stat_result) -> None:
        self.path = path
        self.size_bytes = found.st_size
        self.stamp = stamp_of(found)
        """The stamp of its content when it was opened."""
        self._calls = calls
        self._fd: int | None = fd
        self._direct_fd = direct_fd

    @property
    def map_path(self) -> str:
        descriptors = "/proc/self/fd"
        return f"{descriptors}/{self._fd}" if self._fd is not None and self._calls.isdir(descriptors) else self.path

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill all of `buffer`: once from its aligned head, directly; what is left through the page cache."""
        if self._fd is None:
            raise ValueError(f"{self.path} is closed")
        whole = 0 if offset % PAGE_BYTES else buffer.nbytes // PAGE_BYTES * PAGE_BYTES
        direct_fd = self._direct_fd if whole else None
        done = 0
        while done < buffer.nbytes:
            is_direct = direct_fd is not None
            fd, end = (self._fd, buffer.nbytes) if direct_fd is None else (direct_fd, whole)
            direct_fd = None
            try:
                count = self._calls.pread_into(fd, buffer[done:end], offset + done)
            except InterruptedError:
                continue
            except OSError as error:
                # Memory not aligned, or a file system that refuses late.
                if is_direct and error.errno == errno.EINVAL:
                    continue
                told = f"{error.strerror} (reading at offset {offset + done})"
                raise OSError(error.errno, told, self.path) from error
            if count == 0 and not is_direct:
                raise CorruptCheckpointError(
                    f"{self.path} ends at byte {offset + done}, {buffer.nbytes - done} bytes too early", path=self.path
                )
            done += count

    def read(self, offset: int, num_bytes: int) -> bytes:
        """These bytes of the file. Raises as `pread_into`."""
        data = bytearray(num_bytes)
        self.pread_into(memoryview(data), offset)
        return bytes(data)

    def sync(self) -> None:
        """Make its content durable."""
        assert self._fd is not None
        self._calls.fsync(self._fd)

    def clone_into(self, fd: int, offset: int, num_bytes: int) -> None:
        """Let `fd` share a range of whole blocks, at the same place. Raises OSError: it cannot, and is unchanged."""
        assert self._fd is not None
        self._calls.clone_range(self._fd, fd, offset, num_bytes)

    def close(self) -> None:
        fds = [fd for fd in (self._fd, self._direct_fd) if fd is not None]
        self._fd = self._direct_fd = None
        for fd in fds:
            _close(self._calls, fd)


class LocalDirHandle:
    """The directory `parts` below `root`, open; nothing below `root` is followed."""

    def __init__(self, calls: Syscalls, root: str, parts: Sequence[str] = ()) -> None:
        self._calls = calls
        self._fd: int | None = None
        top = calls.open(root, _DIRECTORY)
        try:
            self._fd, self.path = self._descend(top, root, parts)
        finally:
            if self._fd != top:
                _close(calls, top)
        try:
            found = calls.fstat(self._fd)
        except BaseException:
            self.close()
            raise
        self.identity = (found.st_dev, found.st_ino)

    def entries(self, parts: Sequence[str] = ()) -> list[tuple[str, Kind]]:
        with self._opened(parts) as (fd, _):
            found: list[tuple[str, Kind]] = []
            for name in self._calls.listdir(fd):
                # A name that vanished since the listing is simply not there.
                with contextlib.suppress(FileNotFoundError):
                    found.append((name, kind_of(self._calls.lstat(name, dir_fd=fd).st_mode)))
            return found

    def open_read(self, parts: Sequence[str], *, direct: bool = False) -> LocalReadableFile:
        with self._opened(parts[:-1]) as (parent, folder):
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
            return LocalReadableFile(self._calls, path, fd, direct_fd, found)

    def read_file(self, parts: Sequence[str], max_bytes: int) -> bytes:
        with contextlib.closing(self.open_read(parts)) as file:
            if file.size_bytes > max_bytes:
                raise CorruptCheckpointError(
                    f"{file.path} has {file.size_bytes} bytes; at most {max_bytes} are read", path=file.path
                )
            return file.read(0, file.size_bytes)

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            _close(self._calls, fd)

    def __enter__(self) -> LocalDirHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _opened(self, parts: Sequence[str]) -> Iterator[tuple[int, str]]:
        """The sub-directory `parts`; gives (descriptor, path), closed afterwards unless it is our own."""
        if self._fd is None:
            raise ValueError(f"{self.path} is closed")
        fd, path = self._descend(self._fd, self.path, parts)
        try:
            yield fd, path
        finally:
            if fd != self._fd:
                _close(self._calls, fd)

    def _descend(self, top: int, path: str, parts: Sequence[str]) -> tuple[int, str]:
        """(Descriptor, path) of `parts` below the open directory `top`, which stays open and is it without parts."""
        fd = top
        for part in parts:
            path = os.path.join(path, part)
            try:
                deeper = self._open(part, _DIRECTORY | os.O_NOFOLLOW, fd, path)
            finally:
                if fd != top:
                    _close(self._calls, fd)
            fd = deeper
        return fd, path

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


def _close(calls: Syscalls, fd: int) -> None:
    # Nothing was written through it, so nothing is lost when its close fails; raising would leak what was opened next.
    with contextlib.suppress(OSError):
        calls.close(fd)
