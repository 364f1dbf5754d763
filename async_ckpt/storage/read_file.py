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


class _Descriptor:
    """An open descriptor. Whoever has it closes it; where an interrupt has struck before somebody had it, that it is
    forgotten does."""

    _fd: int | None = None

    def __init__(self, calls: Syscalls, path: str, flags: int, *, parent: int | None = None, shown: str = "") -> None:
        self._calls = calls
        self._path = shown or path
        self._fd = calls.open(path, flags, dir_fd=parent)

    @property
    def number(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self._path} is closed")
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            # Nothing was written through it, so nothing is lost when its close fails; raising would leak what was
            # opened next.
            with contextlib.suppress(OSError):
                self._calls.close(fd)

    def __del__(self) -> None:
        # Nobody catches what is raised here.
        with contextlib.suppress(BaseException):
            self.close()


class LocalReadableFile:
    """A regular file; in direct mode a second, buffered descriptor serves what is not aligned."""

    def __init__(
        self, calls: Syscalls, path: str, opened: _Descriptor, direct: _Descriptor | None, found: os.stat_result
    ) -> None:
        self.path = path
        self.size_bytes = found.st_size
        self.stamp = stamp_of(found)
        """The stamp of its content when it was opened."""
        self._calls = calls
        self._opened = opened
        self._direct = direct

    @property
    def map_path(self) -> str:
        descriptors = "/proc/self/fd"
        return f"{descriptors}/{self._opened.number}" if self._calls.isdir(descriptors) else self.path

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill all of `buffer`: once from its aligned head, directly; what is left through the page cache."""
        buffered_fd = self._opened.number
        whole = 0 if offset % PAGE_BYTES else buffer.nbytes // PAGE_BYTES * PAGE_BYTES
        direct_fd = self._direct.number if whole and self._direct is not None else None
        done = 0
        while done < buffer.nbytes:
            is_direct = direct_fd is not None
            fd, end = (buffered_fd, buffer.nbytes) if direct_fd is None else (direct_fd, whole)
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
        self._calls.fsync(self._opened.number)

    def clone_into(self, fd: int, offset: int, num_bytes: int) -> None:
        """Let `fd` share a range of whole blocks, at the same place. Raises OSError: it cannot, and is unchanged."""
        self._calls.clone_range(self._opened.number, fd, offset, num_bytes)

    def close(self) -> None:
        self._opened.close()
        if self._direct is not None:
            self._direct.close()


class LocalDirHandle:
    """The directory `parts` below `root`, open; nothing below `root` is followed."""

    def __init__(self, calls: Syscalls, root: str, parts: Sequence[str] = ()) -> None:
        self._calls = calls
        self._top = top = _Descriptor(calls, root, _DIRECTORY)
        try:
            self._top, self.path = self._descend(top, root, parts)
            found = calls.fstat(self._top.number)
        except BaseException:
            self.close()
            raise
        finally:
            if self._top is not top:
                top.close()
        self.identity = (found.st_dev, found.st_ino)

    def entries(self, parts: Sequence[str] = ()) -> list[tuple[str, Kind]]:
        with self._opened(parts) as (opened, _):
            found: list[tuple[str, Kind]] = []
            for name in self._calls.listdir(opened.number):
                # A name that vanished since the listing is simply not there.
                with contextlib.suppress(FileNotFoundError):
                    found.append((name, kind_of(self._calls.lstat(name, dir_fd=opened.number).st_mode)))
            return found

    def open_read(self, parts: Sequence[str], *, direct: bool = False) -> LocalReadableFile:
        with self._opened(parts[:-1]) as (parent, folder):
            path = os.path.join(folder, parts[-1])
            opened = self._open(parts[-1], _READ, parent, path)
            try:
                found = self._calls.fstat(opened.number)
                if not stat.S_ISREG(found.st_mode):
                    raise CorruptCheckpointError(f"{path} is not a regular file; it was not read", path=path)
                direct_one = (
                    self._open_direct(parts[-1], parent, (found.st_dev, found.st_ino)) if direct and O_DIRECT else None
                )
            except BaseException:
                opened.close()
                raise
            return LocalReadableFile(self._calls, path, opened, direct_one, found)

    def read_file(self, parts: Sequence[str], max_bytes: int) -> bytes:
        with contextlib.closing(self.open_read(parts)) as file:
            if file.size_bytes > max_bytes:
                raise CorruptCheckpointError(
                    f"{file.path} has {file.size_bytes} bytes; at most {max_bytes} are read", path=file.path
                )
            return file.read(0, file.size_bytes)

    def close(self) -> None:
        self._top.close()

    def __enter__(self) -> LocalDirHandle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _opened(self, parts: Sequence[str]) -> Iterator[tuple[_Descriptor, str]]:
        """The sub-directory `parts`; gives (descriptor, path), closed afterwards unless it is our own."""
        opened, path = self._descend(self._top, self.path, parts)
        try:
            yield opened, path
        finally:
            if opened is not self._top:
                opened.close()

    def _descend(self, top: _Descriptor, path: str, parts: Sequence[str]) -> tuple[_Descriptor, str]:
        """(Descriptor, path) of `parts` below the open directory `top`, which stays open and is it without parts."""
        opened = top
        for part in parts:
            path, above = os.path.join(path, part), opened
            try:
                opened = self._open(part, _DIRECTORY | os.O_NOFOLLOW, above, path)
            finally:
                if above is not top:
                    above.close()
        return opened, path

    def _open(self, name: str, flags: int, parent: _Descriptor, path: str) -> _Descriptor:
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise CorruptCheckpointError(f"{name!r} is not a file name", path=path)
        try:
            return _Descriptor(self._calls, name, flags, parent=parent.number, shown=path)
        except OSError as error:
            # ELOOP: a link; ENOTDIR: a link or file where a directory should be; ENXIO: a socket or device.
            if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO, errno.ENODEV):
                what = "a symbolic link" if error.errno == errno.ELOOP else "not a regular file or directory"
                raise CorruptCheckpointError(f"{path} is {what}; it was not opened", path=path) from error
            raise OSError(error.errno, error.strerror, path) from error

    def _open_direct(self, name: str, parent: _Descriptor, identity: tuple[int, int]) -> _Descriptor | None:
        try:
            opened = _Descriptor(self._calls, name, _READ | O_DIRECT, parent=parent.number)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.ENOENT, errno.ELOOP):
                return None
            raise
        found = self._calls.fstat(opened.number)
        if (found.st_dev, found.st_ino) == identity:
            return opened
        # The name passed to another file in between: stay with the one that is open.
        opened.close()
        return None
