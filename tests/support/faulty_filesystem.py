"""A local file system that records every system call, and fails, shortens or "kills the process" at a chosen one.

The faults sit in the system calls that `FileSystem` is made of, so that its own loops and fallbacks are under
test too. What works here works through the seam alone: pass the object as `filesystem=` to an engine, a catalog or
the functions of `transaction`.

    fs = FaultyFileSystem()
    fs.fail_at(7, errno.EIO)              # the 7th counted call from now on (0-based) fails, once
    fs.fail_when(lambda op: op.name == "fsync" and op.path.endswith(".pt"), errno.EIO)
    fs.kill_at(7, "before")               # or "during" (half of a write is done), "after"
    fs.operations                         # all calls so far, with paths, offsets, data and outcomes

A kill raises `Killed` there and at every later call, and drops all locks, as the kernel does for a dead process. The
object has an owner identity of its own, so that another file system object sees that owner as dead; while this one
is alive, its directory locks protect its staging directories.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from async_ckpt.host.process import Owner, current_owner
from async_ckpt.storage.filesystem import FileSystem
from async_ckpt.storage.syscalls import EXCHANGE, O_DIRECT
from async_ckpt.storage.write_file import WritableFile

COUNTED = {"create", "open", "close", "pwrite", "fsync", "truncate", "allocate", "clone", "mkdir", "rmdir", "unlink"}
COUNTED |= {"link", "rename", "exchange", "chmod", "flock"}
"""Calls that faults count; the rest (listdir, lstat, read, fstat, ...) is recorded only where it matters."""

When = Literal["before", "during", "after"]
_numbers = itertools.count(1)


class Killed(BaseException):
    """The process died here. Not an `Exception`: nothing may handle it."""


@dataclass
class Operation:
    """One call. `path` is absolute and normal; `name` is as in COUNTED, or "read", "listdir", "lstat"."""

    index: int
    """Position among the counted calls; -1 for those not counted."""
    name: str
    path: str
    dst: str | None = None
    offset: int | None = None
    num_bytes: int | None = None
    data: bytes | None = None
    """What a pwrite has written, where data is kept: its first `num_bytes` bytes."""
    mode: int | None = None
    direct: bool = False
    is_dir: bool = False
    """Of an open or fsync: that of a directory."""
    outcome: str = "begun"
    """"ok", the errno's name, or "killed"; a write that was cut short is "ok" with a smaller `num_bytes`."""


class FaultyFileSystem(FileSystem):
    """Records and injects."""

    def __init__(self, *, keep_data: bool = False) -> None:
        super().__init__()
        me = current_owner()
        self._me = dataclasses.replace(me, start_ticks=me.start_ticks + 10**9 + next(_numbers))
        self.operations: list[Operation] = []
        """All calls so far."""
        self.num_counted = 0
        """How many counted calls were made so far: the range of a sweep over all of them."""
        self.killed = False
        """Whether the kill has happened."""
        self.keep_data = keep_data
        self.short_writes: Callable[[Operation], int] | None = None
        self.refuse_direct_open = False
        self.refuse_direct_write = False
        self.refuse_exchange = False
        self.refuse_noreplace = False
        self.refuse_locks = False
        self.emulate_clones = False
        """Files share blocks, as far as anybody can tell who does not count them."""
        self.before: Callable[[Operation], None] | None = None
        self.faults: list[tuple[Callable[[Operation], bool], int]] = []
        self.kill: tuple[int, When] | None = None
        self._guard = threading.RLock()
        self._paths: dict[int, str] = {}
        self._owned: set[int] = set()
        self._locked: set[int] = set()
        self._direct: set[int] = set()

    # --- the faults

    def fail_at(self, k: int, code: int, *, sticky: bool = False) -> None:
        """The k-th counted call from now on fails with errno `code`; `sticky`: and all that follow."""
        first = self.num_counted + k
        self.fail_when(lambda op: op.index >= first if sticky else op.index == first, code)

    def fail_when(self, applies: Callable[[Operation], bool], code: int) -> None:
        """Every call that `applies` says fails with errno `code`, until `heal`."""
        self.faults.append((applies, code))

    def heal(self) -> None:
        """No more faults (a kill stays)."""
        self.faults.clear()
        self.short_writes = None

    def kill_at(self, k: int, when: When = "before") -> None:
        """The process dies at the k-th counted call from now on."""
        self.kill = (self.num_counted + k, when)

    def owner(self) -> Owner:
        return self._me

    # --- the machinery

    @contextlib.contextmanager
    def _call(self, name: str, path: str, **details: object) -> Iterator[Operation]:
        with self._guard:
            if self.killed:
                raise Killed(f"{name} {path} after the kill")
            index = -1
            if name in COUNTED:
                index, self.num_counted = self.num_counted, self.num_counted + 1
            operation = Operation(index, name, path, **details)  # type: ignore[arg-type]
            self.operations.append(operation)
        if self.before is not None:
            self.before(operation)
        when = self.kill[1] if self.kill is not None and index >= 0 and self.kill[0] == index else None
        if when == "before" or (when == "during" and name != "pwrite"):
            self.die(operation)
        for applies, code in self.faults:
            if applies(operation):
                operation.outcome = errno.errorcode[code]
                raise OSError(code, os.strerror(code), path)
        try:
            yield operation
        except OSError as error:
            operation.outcome = errno.errorcode.get(error.errno or 0, "EIO")
            if when is not None:
                self.die(operation)
            raise
        operation.outcome = "ok"
        if when is not None:
            self.die(operation)

    def die(self, operation: Operation) -> None:
        with self._guard:
            self.killed = True
            if operation.outcome == "begun":
                operation.outcome = "killed"
            for fd in self._locked:
                os.close(fd)
                self._owned.discard(fd)
            self._locked.clear()
        raise Killed(f"at call {operation.index}: {operation.name} {operation.path}")

    def path_of(self, fd: int) -> str:
        return self._paths.get(fd, f"<{fd}>")

    def dispose(self) -> None:
        """Close the descriptors that a kill left open; call at the end of the test."""
        with self._guard:
            for fd in self._owned:
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._owned.clear()

    def full_path(self, path: str, dir_fd: int | None = None) -> str:
        base = os.getcwd() if dir_fd is None else self.path_of(dir_fd)
        return os.path.normpath(os.path.join(base, path))

    # --- the calls

    def open(self, path: str, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        full = self.full_path(path, dir_fd)
        name = "create" if flags & os.O_CREAT else "open"
        direct = bool(O_DIRECT and flags & O_DIRECT)
        fd = -1
        try:
            with self._call(name, full, mode=mode, direct=direct, is_dir=bool(flags & os.O_DIRECTORY)):
                if direct and self.refuse_direct_open:
                    if flags & os.O_CREAT:
                        # As the kernel: the file is there when the flag is refused.
                        os.close(os.open(path, flags & ~O_DIRECT, mode, dir_fd=dir_fd))
                    raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), path)
                fd = super().open(path, flags, mode, dir_fd=dir_fd)
                with self._guard:
                    self._paths[fd] = full
                    (self._direct.add if direct else self._direct.discard)(fd)
                    if name == "open":
                        self._owned.add(fd)
        except Killed:
            if fd >= 0 and name == "create":
                os.close(fd)
            raise
        return fd

    def close(self, fd: int) -> None:
        path = self.path_of(fd)
        with self._guard:
            if self.killed and fd not in self._owned and fd not in self._paths:
                raise Killed(f"close {path} after the kill")
            self._owned.discard(fd)
            self._locked.discard(fd)
        # A close that fails has closed all the same.
        with contextlib.suppress(OSError):
            super().close(fd)
        with self._call("close", path):
            pass

    def pwrite(self, fd: int, buffer: memoryview, offset: int) -> int:
        direct = fd in self._direct
        with self._call("pwrite", self.path_of(fd), offset=offset, num_bytes=0, direct=direct) as operation:
            if direct and self.refuse_direct_write:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), operation.path)
            wanted = len(buffer)
            operation.num_bytes = wanted
            if self.short_writes is not None:
                wanted = max(1, min(wanted, self.short_writes(operation)))
            if self.kill == (operation.index, "during"):
                wanted = max(1, wanted // 2)
            if direct and wanted < len(buffer):
                # A direct write cannot really be shortened to any length: write all, report less.
                operation.num_bytes = 0
                super().pwrite(fd, buffer, offset)
                count = wanted
            else:
                count = super().pwrite(fd, buffer[:wanted], offset)
            operation.num_bytes = count
            if self.keep_data:
                operation.data = bytes(buffer[:count])
            return count

    def pread_into(self, fd: int, buffer: memoryview, offset: int) -> int:
        with self._call("read", self.path_of(fd), offset=offset, num_bytes=len(buffer)):
            return super().pread_into(fd, buffer, offset)

    def fsync(self, fd: int) -> None:
        path = self.path_of(fd)
        with self._call("fsync", path, is_dir=os.path.isdir(path)):
            super().fsync(fd)

    def ftruncate(self, fd: int, size_bytes: int) -> None:
        with self._call("truncate", self.path_of(fd), num_bytes=size_bytes):
            super().ftruncate(fd, size_bytes)

    def allocate(self, fd: int, size_bytes: int, offset: int = 0) -> None:
        with self._call("allocate", self.path_of(fd), offset=offset, num_bytes=size_bytes):
            super().allocate(fd, size_bytes, offset)

    def clone_range(self, source: int, fd: int, offset: int, num_bytes: int) -> None:
        details = {"dst": self.path_of(source), "offset": offset, "num_bytes": num_bytes, "direct": fd in self._direct}
        with self._call("clone", self.path_of(fd), **details) as operation:
            if not self.emulate_clones:
                super().clone_range(source, fd, offset, num_bytes)
                return
            buffer = mmap.mmap(-1, num_bytes)
            assert os.preadv(source, [buffer], offset) == os.pwrite(fd, buffer, offset) == num_bytes
            if self.keep_data:
                operation.data = buffer[:]

    def clear_direct(self, fd: int) -> None:
        super().clear_direct(fd)
        self._direct.discard(fd)

    def mkdir(self, path: str, *, private: bool = False) -> None:
        with self._call("mkdir", self.full_path(path)):
            super().mkdir(path, private=private)

    def rmdir(self, path: str) -> None:
        with self._call("rmdir", self.full_path(path)):
            super().rmdir(path)

    def unlink(self, path: str) -> None:
        with self._call("unlink", self.full_path(path)):
            super().unlink(path)

    def link(self, path: str, name: str) -> None:
        with self._call("link", self.full_path(path), dst=self.full_path(name)):
            super().link(path, name)

    def rename(self, src: str, dst: str) -> None:
        with self._call("rename", self.full_path(src), dst=self.full_path(dst)):
            super().rename(src, dst)

    def renameat2(self, src: str, dst: str, flags: int) -> None:
        refused = self.refuse_exchange if flags == EXCHANGE else self.refuse_noreplace
        with self._call("exchange" if flags == EXCHANGE else "rename", self.full_path(src), dst=self.full_path(dst)):
            if refused:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), src)
            super().renameat2(src, dst, flags)

    def chmod(self, path: str, mode: int) -> None:
        with self._call("chmod", self.full_path(path), mode=mode):
            super().chmod(path, mode)

    def flock(self, fd: int) -> bool:
        with self._call("flock", self.path_of(fd)):
            if self.refuse_locks:
                raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP), self.path_of(fd))
            held = super().flock(fd)
            if held:
                with self._guard:
                    self._locked.add(fd)
            return held

    def unlock(self, fd: int) -> None:
        with self._guard:
            # After a kill the number may be that of somebody else's file.
            if fd in self._locked:
                super().unlock(fd)

    def listdir(self, path: str | int) -> list[str]:
        with self._call("listdir", self.path_of(path) if isinstance(path, int) else self.full_path(path)):
            return super().listdir(path)

    def lstat(self, path: str, *, dir_fd: int | None = None) -> os.stat_result:
        with self._call("lstat", self.full_path(path, dir_fd)):
            return super().lstat(path, dir_fd=dir_fd)

    async def open_write(self, path: str, size_bytes: int, **how: Any) -> WritableFile:
        file = await super().open_write(path, size_bytes, **how)
        assert isinstance(file, WritableFile)
        file._file = _FaultyHandle(file._file, self, file.path)
        return file


class _FaultyHandle:
    """The aiofiles object: its close does not pass through the table, so the fault is put here."""

    def __init__(self, inner: Any, calls: FaultyFileSystem, path: str) -> None:
        self._inner = inner
        self._calls = calls
        self._path = calls.full_path(path)

    @property
    def closed(self) -> bool:
        return bool(self._inner.closed)

    async def close(self) -> None:
        await self._inner.close()
        with self._calls._call("close", self._path):
            pass
