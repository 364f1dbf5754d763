"""The seam to the disk: every file system call of the package passes through `FileSystem`.

Each method is one system call (`syscalls.Syscalls`) or a handful with one outcome, so that a fault can be put at every
single step: tests bring an object with other system calls instead of patching `os`.

Guarantees:
- Nothing is followed: files inside a checkpoint are opened component by component with O_NOFOLLOW, and only
  regular files are read.
- New files are made with O_EXCL; their modes and those of directories are what the umask leaves. Private directories
  are 0700.
- Synchronous methods may block on the disk and may be called from any thread. They raise the plain `OSError` with
  its path; the writing side (`open_write`, `create_file`) raises `WriteError` and `OutOfSpaceError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as _stat
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from ..format.names import is_url
from ..host.process import Owner, OwnerState, current_owner, owner_state
from . import probe, write_file
from .probe import OCCUPIED, Findings
from .read_file import Kind, LocalDirHandle, LocalReadableFile, kind_of
from .syscalls import EXCHANGE, NOREPLACE, O_DIRECT, REFUSED, Syscalls
from .write_error import as_write_error
from .write_file import INCOMPLETE, Ranges, WritableFile, open_new

T = TypeVar("T")
R = TypeVar("R")

LOCAL_TYPES = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "tmpfs", "f2fs", "zfs", "bcachefs", "overlay"})
"""File systems that one kernel owns, with atomic rename: the promises are made for these."""
COHERENT_TYPES = LOCAL_TYPES | {"lustre", "gpfs"}
"""What one process has written, all others see, and several may write parts of one file: on one host, or by locks."""


@dataclass(frozen=True)
class FileStat:
    """What lstat says; `identity` is (device, inode), `mode` the permission bits."""

    kind: Kind
    size_bytes: int
    mode: int
    identity: tuple[int, int]
    mtime_ns: int


class ReadableFile(Protocol):
    """One open regular file; any thread, calls may overlap, except with `close`."""

    path: str
    """Where the file was when it was opened."""
    size_bytes: int
    """Length when it was opened."""

    @property
    def map_path(self) -> str:
        """A path to this very file while it is open here, whoever has its name by now: for code that maps by path."""

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill all of `buffer` from `offset`. Raises CorruptCheckpointError: the file ends before that. OSError."""

    def close(self) -> None:
        """Close it; idempotent."""


class DirHandle(Protocol):
    """One open directory: keeps naming the same tree when its path is renamed or exchanged. Any thread."""

    path: str
    """Where the directory was when it was opened."""
    identity: tuple[int, int]
    """(device, inode); not reused by another directory while the handle is open."""

    def entries(self, parts: Sequence[str] = ()) -> list[tuple[str, Kind]]:
        """Names and kinds in the sub-directory `parts`."""

    def open_read(self, parts: Sequence[str], *, direct: bool = False) -> ReadableFile:
        """Open the regular file `parts` below this directory, following nothing. Raises FileNotFoundError.
        CorruptCheckpointError: it, or a directory on the way, is a symbolic link or not a regular file."""

    def read_file(self, parts: Sequence[str], max_bytes: int) -> bytes:
        """The whole content of a small file; CorruptCheckpointError if it is larger than `max_bytes`."""

    def close(self) -> None:
        """Close it; idempotent."""


class ReadSide(Protocol):
    """What reading checkpoints needs: of a disk, or of a store that is shown as if it were one. Blocks; any thread."""

    def owner_state(self, owner: Owner) -> OwnerState:
        """Whether it can still be alive."""

    def listdir(self, path: str) -> list[str]:
        """Names in a directory, in no order."""

    def stat(self, path: str) -> FileStat:
        """lstat; `kind` is "missing" where nothing is there."""

    def open_dir(self, root: str, parts: Sequence[str] = ()) -> DirHandle:
        """Open the directory `parts` below `root`; `root` itself may be a link, nothing below it may."""

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`function` of each item, in their order; many at once where the way to the data is long."""


class FileLock:
    """The held lock of a directory or file; ends with `close` or with the process. Unlocked by its own process only: a
    forked child shares the lock, must not drop it for its parent, nor keep it for it."""

    def __init__(self, calls: Syscalls, fd: int) -> None:
        found = calls.fstat(fd)
        self.identity = (found.st_dev, found.st_ino)
        """The identity of what is locked; not reused while the lock is held."""
        self._pid = os.getpid()
        self._calls = calls
        self._fd: int | None = fd

    def close(self) -> None:
        """Let go; idempotent."""
        fd, self._fd = self._fd, None
        # A descriptor that was never written through has nothing to lose when its close fails.
        with contextlib.suppress(OSError):
            if fd is not None:
                try:
                    if os.getpid() == self._pid:
                        self._calls.unlock(fd)
                finally:
                    self._calls.close(fd)


class FileSystem(Syscalls):
    """The file system of this machine: its system calls, and what is made of them."""

    def __init__(self) -> None:
        self.findings = Findings()
        """What the last `probe` has found."""
        self.root_types: dict[str, str] = {}
        """By root, as it is mounted, of those that `make_root` has looked at."""

    def owner(self) -> Owner:
        """Who makes staging directories through this object: this process."""
        return current_owner()

    def owner_state(self, owner: Owner) -> OwnerState:
        return owner_state(owner, self.owner())

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        return [function(item) for item in items]

    def makedirs(self, path: str) -> None:
        """Make `path` and its missing parents, 0777 less the umask; being there already is fine."""
        if self.isdir(path):
            return
        parent = os.path.dirname(path)
        if parent and parent != path:
            self.makedirs(parent)
        try:
            self.mkdir(path)
        except FileExistsError:
            if not self.isdir(path):
                raise

    def stat(self, path: str) -> FileStat:
        try:
            found = self.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return FileStat("missing", 0, 0, (0, 0), 0)
        mode = _stat.S_IMODE(found.st_mode)
        return FileStat(kind_of(found.st_mode), found.st_size, mode, (found.st_dev, found.st_ino), found.st_mtime_ns)

    def rename_noreplace(self, src: str, dst: str) -> None:
        """Rename a directory, atomically refusing (FileExistsError) a `dst` that exists."""
        taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), dst)
        try:
            self.renameat2(src, dst, NOREPLACE)
            return
        except OSError as error:
            # Not EEXIST: the flag was ignored, and the rename itself refused.
            if error.errno in OCCUPIED:
                raise taken from error
            if error.errno not in REFUSED:
                raise
        if self.stat(dst).kind != "missing":
            raise taken
        # A checkpoint is never an empty directory, so the kernel's own ENOTEMPTY closes the gap after the check.
        try:
            self.rename(src, dst)
        except OSError as error:
            if error.errno in OCCUPIED | {errno.ENOTDIR}:
                raise taken from error
            raise

    def rename_exchange(self, a: str, b: str) -> None:
        """Swap two names atomically; OSError EINVAL, ENOSYS or ENOTSUP where it cannot be done."""
        self.renameat2(a, b, EXCHANGE)

    def fsync_dir(self, path: str) -> None:
        """Make the names in a directory durable."""
        fd = self.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(fd)
        except OSError as error:
            # How a file system says that it has no such call for directories: then names are durable when they are
            # made, or never.
            if error.errno != errno.EINVAL:
                raise
        finally:
            self.close(fd)

    create_file = write_file.create_file
    """Make a new file with `data`, and blocks for so much, complete, synced and closed (O_EXCL). Raises
    PathExistsError: it is there, and stays as it is."""

    def read_file(self, path: str, max_bytes: int) -> bytes:
        """The whole content of a small regular file; the last component is not followed."""
        folder, name = os.path.split(path)
        with LocalDirHandle(self, folder or ".") as handle:
            return handle.read_file((name,), max_bytes)

    def open_dir(self, root: str, parts: Sequence[str] = ()) -> LocalDirHandle:
        return LocalDirHandle(self, root, parts)

    def open_read(self, root: str, parts: Sequence[str], *, direct: bool = False) -> LocalReadableFile:
        """Open the regular file `parts` below `root`; as `DirHandle.open_read`."""
        with LocalDirHandle(self, root) as handle:
            return handle.open_read(parts, direct=direct)

    def lock(self, path: str) -> FileLock | None:
        """Take the exclusive lock (flock) of a directory or file without waiting; None if someone holds it. Raises
        OSError: ENOTSUP or ENOLCK where the file system has no locks."""
        # A FIFO in its place must not hang the open.
        fd = self.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        lock = None
        try:
            if self.flock(fd):
                lock = FileLock(self, fd)
        finally:
            if lock is None:
                self.close(fd)
        return lock

    def probe(self, folder: str, *, clones_only: bool = False) -> None:
        """Try in an empty private directory what a file system does that is not known to be local; of one that is, only
        whether files can share blocks."""
        self.findings = Findings(clones=probe.can_clone(self, folder)) if clones_only else probe.probe(self, folder)

    def cannot_clone(self) -> None:
        """Do not ask again: a file system, or a sandbox, has refused to clone for good."""
        self.findings = replace(self.findings, clones=False)

    amend = write_file.amend
    """Cut a file to its length, overwrite bytes of it, where they differ, and make that durable; returns what stood
    there before. Raises WriteError."""

    async def open_write(
        self,
        path: str,
        size_bytes: int,
        *,
        direct: bool,
        executor: Executor,
        written: Ranges | None = None,
        shared: bool = False,
    ) -> WritableFile:
        """Make a new file of (later) `size_bytes` and open it for parallel writes. Raises WriteError.

        Falls back to buffered where O_DIRECT is refused. Space is reserved where that lets direct writes run in
        parallel (ext4, xfs): for what of it will be `written`. On failure nothing is left behind, unless the file is
        `shared`: whoever of several processes comes first has made it, and has reserved all.
        """
        # The padded end of a direct write must be cut off again.
        is_direct = bool(direct and O_DIRECT) and not self.findings.ignores_truncate
        # A copy: another thread may look at a root meanwhile.
        roots = [root for root in list(self.root_types) if path.startswith(os.path.join(root, ""))]
        root = max(roots, key=len, default="")
        needed_bytes = size_bytes if written is None else sum(num_bytes for _, num_bytes in written)

        def opener(path: str, flags: int) -> int:
            nonlocal is_direct
            kind = self.root_types.get(root) or self.fs_type(os.path.dirname(path) or ".")
            # Newer kernels take the flag on tmpfs and ignore it: say what really happens.
            fd, is_direct = open_new(self, path, size_bytes, is_direct and kind != "tmpfs", kind, written, shared)
            return fd

        # Not at the top: readers (the catalog, the command line) start three times faster without asyncio.
        import aiofiles

        with as_write_error(self, f"opening{INCOMPLETE}", path, needed_bytes=needed_bytes):
            file = await aiofiles.open(path, "xb", buffering=0, opener=opener, executor=executor)
        return WritableFile(self, path, size_bytes, needed_bytes, file, direct=is_direct)


_openers: list[Callable[[str], ReadSide]] = []


def open_urls_with(opener: Callable[[str], ReadSide]) -> None:
    """Say who opens URLs (``s3://bucket/run``) for reading."""
    _openers[:] = [opener]


def read_side_of(path: str) -> ReadSide:
    """What a root, or a path in one, is read through. Raises ConfigError: a URL that no mirror can have, or whose
    library is not installed."""
    return _openers[0](path) if is_url(path) else FileSystem()
