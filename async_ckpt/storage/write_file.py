"""Writing side of `FileSystem`: one new file over aiofiles, with O_DIRECT where the file system takes it.
Direct writes stay aligned through short writes.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import CheckpointError, PathExistsError
from ..host.memory import PAGE_BYTES
from .read_file import LocalReadableFile, Stamp, stamp_of
from .syscalls import O_DIRECT, REFUSED, Syscalls
from .write_error import as_write_error, write_error

# On these, writing into reserved space does not move the end of the file, so direct writes run in parallel.
_PREALLOCATED_TYPES = frozenset({"ext4", "xfs"})
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o666  # the kernel takes the umask off
_MAX_STALLED_WRITES = 3
INCOMPLETE = " failed, the file is incomplete and is not committed"


def create_file(calls: Syscalls, path: str, data: bytes, reserved_bytes: int = 0) -> None:
    """Make a new small file with `data`: written completely, synced, closed; with blocks for more."""
    create_of_parts(calls, path, iter([memoryview(data)]), len(data), reserved_bytes)


def create_of_parts(
    calls: Syscalls, path: str, parts: Iterator[memoryview], size_bytes: int, reserved_bytes: int = 0
) -> None:
    """As `create_file`; each part is let go once it is written."""
    offset = 0
    try:
        fd = calls.open(path, _CREATE, _MODE)
        try:
            if reserved_bytes:
                # As where its type is one that gives them.
                _reserve(calls, fd, reserved_bytes, "xfs", None)
            for part in parts:
                end = offset + len(part)
                while offset < end:
                    offset += _write_some(calls, fd, path, part[offset - end :], offset)
                del part
            calls.fsync(fd)
        finally:
            calls.close(fd)
    except FileExistsError as error:
        raise PathExistsError(f"{path!r} exists already, and stays as it is") from error
    except CheckpointError:
        # Of what gives the parts.
        raise
    except OSError as error:
        raise write_error(calls, error, f"writing{INCOMPLETE}", path, offset=offset, needed_bytes=size_bytes) from error


def _write_some(calls: Syscalls, fd: int, path: str, buffer: memoryview, offset: int) -> int:
    """Bytes written: none where a signal came first."""
    try:
        count = calls.pwrite(fd, buffer, offset)
    except InterruptedError:
        return 0
    if count == 0:
        raise OSError(errno.EIO, "the write made no progress", path)
    return count


Ranges = Sequence[tuple[int, int]]
"""(Offset, bytes) of what of a file will be written."""


def amend(calls: Syscalls, path: str, size_bytes: int, changes: Sequence[tuple[int, bytes]]) -> list[bytes]:
    """See `FileSystem.amend`."""
    before: list[bytes] = []
    with as_write_error(calls, f"amending{INCOMPLETE}", path):
        fd = calls.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for offset, data in changes:
                found = bytearray(len(data))
                done = 0
                while done < len(data) and (count := calls.pread_into(fd, memoryview(found)[done:], offset + done)):
                    done += count
                before.append(bytes(found))
                done = 0 if found != data else len(data)
                while done < len(data):
                    done += _write_some(calls, fd, path, memoryview(data)[done:], offset + done)
            is_longer = calls.fstat(fd).st_size > size_bytes
            if is_longer:
                calls.ftruncate(fd, size_bytes)
            if is_longer or before != [data for _, data in changes]:
                calls.fsync(fd)
        finally:
            calls.close(fd)
    return before


def open_new(
    calls: Syscalls, path: str, size_bytes: int, direct: bool, fs_type: str, written: Ranges | None, shared: bool
) -> tuple[int, bool]:
    """Make, open and reserve in one go, on the executor's thread; gives the descriptor, and whether O_DIRECT is in
    use."""
    create = _CREATE & ~os.O_EXCL if shared else _CREATE
    fd = -1
    if direct:
        try:
            fd = calls.open(path, create | O_DIRECT, _MODE)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            # The kernel makes the file before it looks at the flag.
            direct = False
            if not shared:
                with contextlib.suppress(FileNotFoundError):
                    calls.unlink(path)
    if not direct:
        return calls.open(path, create, _MODE), False
    try:
        # Whoever is first reserves all: reserving waits for the direct writes of others.
        if not shared or calls.fstat(fd).st_size < size_bytes:
            _reserve(calls, fd, size_bytes, fs_type, written)
    except BaseException:
        calls.close(fd)
        if not shared:
            calls.unlink(path)
        raise
    return fd, True


def _reserve(calls: Syscalls, fd: int, size_bytes: int, fs_type: str, written: Ranges | None) -> None:
    if size_bytes and fs_type in _PREALLOCATED_TYPES:
        try:
            if written is None:
                calls.allocate(fd, size_bytes)
                return
            for offset, num_bytes in written:
                calls.allocate(fd, num_bytes, offset)
        except OSError as error:
            if error.errno not in REFUSED:
                raise
    if size_bytes:
        calls.ftruncate(fd, size_bytes)


class WritableFile:
    """One new file being written. Blocks on the disk; any thread, and calls may overlap, except with `close`. They
    raise WriteError and OutOfSpaceError; after that, only `close` is called."""

    def __init__(
        self, calls: Syscalls, path: str, size_bytes: int, needed_bytes: int, file: Any, *, direct: bool
    ) -> None:
        self._calls = calls
        self.path = path
        """Where the file is."""
        self.size_bytes = size_bytes
        """Of what is reserved."""
        self._needed_bytes = needed_bytes
        self.stamp: Stamp | None = None
        """Of its content, once it is synced."""
        self._file = file
        self._fd: int = file.fileno()
        self.direct = direct
        """Whether O_DIRECT is in use; turns False when the file system refuses it."""

    def pwrite(self, buffer: memoryview, offset: int) -> None:
        """Write all of `buffer` at `offset`; short writes and EINTR are resumed. In direct mode address, offset and
        length should be multiples of 4096: the file goes on through the page cache where they are not. (A padded end is
        cut off by `truncate`.)"""
        view = buffer.cast("B")
        with self._telling("writing", offset):
            done = self._write_direct(view, offset) if self.direct else 0
            while done < view.nbytes:
                done += _write_some(self._calls, self._fd, self.path, view[done:], offset + done)

    def clone(self, source: LocalReadableFile, offset: int, num_bytes: int) -> OSError | None:
        """Share a range of `source`, at the same place, instead of writing it; whole pages. Returns why it cannot: then
        the range is as it was, and is to be written."""
        try:
            source.clone_into(self._fd, offset, num_bytes)
        except OSError as error:
            return error
        return None

    def truncate(self, size_bytes: int) -> None:
        """Set the length of the file."""
        with self._telling("setting the length"):
            self._calls.ftruncate(self._fd, size_bytes)

    def fsync(self) -> None:
        """Make content and length durable. Not to be called again where it fails: the kernel may have dropped the dirty
        pages that it could not write, and would call the second attempt good."""
        with self._telling("fsync"):
            self._calls.fsync(self._fd)
            self.stamp = stamp_of(self._calls.fstat(self._fd))

    async def close(self) -> None:
        """Close the descriptor; idempotent. A call still at work would write into whatever file gets its number."""
        if not self._file.closed:
            with self._telling("closing"):
                await self._file.close()

    def _telling(self, what: str, offset: int | None = None) -> contextlib.AbstractContextManager[None]:
        told = f"{what}{INCOMPLETE}"
        return as_write_error(self._calls, told, self.path, offset=offset, needed_bytes=self._needed_bytes)

    def _write_direct(self, buffer: memoryview, offset: int) -> int:
        """Bytes written past the page cache, in whole pages: less than all only after direct mode was given up."""
        done = num_stalled = 0
        if offset % PAGE_BYTES or buffer.nbytes % PAGE_BYTES:
            self._leave_direct()
        while self.direct and done < buffer.nbytes:
            try:
                count = _write_some(self._calls, self._fd, self.path, buffer[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # Accepted at open, refused now; or memory that is not aligned.
                self._leave_direct()
                break
            # A short write may end inside a page: that page is written again.
            done += count // PAGE_BYTES * PAGE_BYTES
            num_stalled = 0 if count >= PAGE_BYTES else num_stalled + 1
            if num_stalled > _MAX_STALLED_WRITES:
                self._leave_direct()
        return done

    def _leave_direct(self) -> None:
        """Go on through the page cache with the same descriptor; direct writes in flight are not disturbed."""
        self._calls.clear_direct(self._fd)
        self.direct = False
