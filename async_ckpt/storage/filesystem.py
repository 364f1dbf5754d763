"""The seam to the disk: every file system call of the package passes through `FileSystem`.

It is this narrow so that a fault can be put at every single step: each method is one system call or a handful with
one outcome, and tests swap the whole object (or its `_syscalls.Syscalls`) instead of patching `os`.

Guarantees:
- Nothing is followed: files inside a checkpoint are opened component by component with O_NOFOLLOW, and only
  regular files are read.
- New files are made with O_EXCL; their modes and those of directories are what the umask leaves. Private directories
  are 0700.
- Synchronous methods may block on the disk and may be called from any thread. They raise the plain `OSError` with
  its path; the writing side (`open_write`, `WritableFile`, `create_file`) raises `WriteError` and `OutOfSpaceError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from ..host.process import Owner, OwnerState
from .probe import Findings

T = TypeVar("T")
R = TypeVar("R")
Kind = Literal["file", "dir", "other", "missing"]

LOCAL_TYPES = frozenset({"ext4", "xfs", "btrfs", "tmpfs", "f2fs", "zfs", "bcachefs", "overlay"})
"""File systems that one kernel owns, with atomic rename: the promises are made for these."""


@dataclass(frozen=True)
class FileStat:
    """What lstat says; `identity` is (device, inode), `mode` the permission bits."""

    kind: Kind
    size_bytes: int
    mode: int
    identity: tuple[int, int]
    mtime_ns: int


class WritableFile(Protocol):
    """One new file being written. Coroutines run on the loop thread, their system calls in the given executor.

    The first failure stays: every later call but `close` raises it again. A failed fsync is never repeated.
    """

    @property
    def path(self) -> str:
        """Where the file is."""

    @property
    def direct(self) -> bool:
        """Whether O_DIRECT is in use; turns False when the file system refuses it."""

    def pwrite(self, buffer: memoryview, offset: int) -> None:
        """Write all of `buffer` at `offset`; short writes and EINTR are resumed. Blocks on the disk; any thread.

        Several may be in flight. In direct mode address and offset should be multiples of 4096; only the last bytes
        of the file may have a ragged length (they go through a padded copy, so call `truncate` before `fsync`).

        Raises:
            WriteError, OutOfSpaceError: with path, offset and errno.
        """

    async def truncate(self, size_bytes: int) -> None:
        """Set the length of the file."""

    async def fsync(self) -> None:
        """Make content and length durable. Fails once and for good."""

    async def close(self) -> None:
        """Close the descriptor once no write on it is running any more; idempotent."""


class ReadableFile(Protocol):
    """One open regular file; any thread, calls may overlap, except with `close`."""

    @property
    def path(self) -> str:
        """Where the file was when it was opened."""

    @property
    def map_path(self) -> str:
        """A path to this very file while it is open here, whoever has its name by now: for code that maps by path."""

    @property
    def size_bytes(self) -> int:
        """Length when it was opened."""

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        """Fill all of `buffer` from `offset`.

        Raises:
            CorruptCheckpointError: the file ends before that.
            OSError: the disk failed.
        """

    def close(self) -> None:
        """Close the descriptors; idempotent."""


class DirHandle(Protocol):
    """One open directory: keeps naming the same tree when its path is renamed or exchanged. Any thread."""

    @property
    def path(self) -> str:
        """Where the directory was when it was opened."""

    @property
    def identity(self) -> tuple[int, int]:
        """(device, inode); not reused by another directory while the handle is open."""

    def entries(self, parts: Sequence[str] = ()) -> list[tuple[str, Kind]]:
        """Names and kinds in the sub-directory `parts`."""

    def open_read(self, parts: Sequence[str], *, direct: bool = False) -> ReadableFile:
        """Open the regular file `parts` below this directory, following nothing.

        Raises:
            FileNotFoundError: it is not there.
            CorruptCheckpointError: it, or a directory on the way, is a symbolic link or not a regular file.
        """

    def read_file(self, parts: Sequence[str], max_bytes: int) -> bytes:
        """The whole content of a small file; CorruptCheckpointError if it is larger than `max_bytes`."""

    def close(self) -> None:
        """Close the descriptor; idempotent."""


class LockHandle(Protocol):
    """A held lock of a directory or file; ends with `close` or with the process."""

    @property
    def identity(self) -> tuple[int, int]:
        """(device, inode) of what is locked; not reused while the lock is held."""

    def close(self) -> None:
        """Let go; idempotent."""


class ReadSide(Protocol):
    """What reading checkpoints needs: of a disk, or of a store that is shown as if it were one. Blocks; any thread."""

    def owner_state(self, owner: Owner) -> OwnerState:
        """Whether `owner` can still be alive."""

    def listdir(self, path: str) -> list[str]:
        """Names in a directory, in no order."""

    def stat(self, path: str) -> FileStat:
        """lstat; `kind` is "missing" where nothing is there."""

    def open_dir(self, root: str, parts: Sequence[str] = ()) -> DirHandle:
        """Open the directory `parts` below `root`; `root` itself may be a link, nothing below it may."""

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`function` of each item, in their order; many at once where the way to the data is long."""


class FileSystem(ReadSide, Protocol):
    """Every file operation of the package. See the module docstring for threads, blocking and errors."""

    def owner(self) -> Owner:
        """Who makes staging directories through this object: this process."""

    def mkdir(self, path: str, *, private: bool = False) -> None:
        """Make one directory: 0700 if `private`, else 0777 less the umask. FileExistsError if it is there."""

    def makedirs(self, path: str) -> None:
        """Make `path` and its missing parents, 0777 less the umask; being there already is fine."""

    def chmod(self, path: str, mode: int) -> None:
        """Set permission bits."""

    def rename(self, src: str, dst: str) -> None:
        """Plain rename."""

    def rename_noreplace(self, src: str, dst: str) -> None:
        """Rename a directory, atomically refusing (FileExistsError) a `dst` that exists."""

    def rename_exchange(self, a: str, b: str) -> None:
        """Swap two names atomically; OSError EINVAL, ENOSYS or ENOTSUP where it cannot be done."""

    def link(self, path: str, name: str) -> None:
        """Give a file a second name."""

    def unlink(self, path: str) -> None:
        """Remove a file or link."""

    def rmdir(self, path: str) -> None:
        """Remove an empty directory."""

    def fsync_dir(self, path: str) -> None:
        """Make the names in a directory durable."""

    def create_file(self, path: str, data: bytes) -> None:
        """Make a new file with `data`, complete, synced and closed (O_EXCL)."""

    def read_file(self, path: str, max_bytes: int) -> bytes:
        """The whole content of a small regular file; the last component is not followed."""

    def open_read(self, root: str, parts: Sequence[str], *, direct: bool = False) -> ReadableFile:
        """Open the regular file `parts` below `root`; as `DirHandle.open_read`."""

    def lock_dir(self, path: str) -> LockHandle | None:
        """Take the directory's exclusive lock (flock) without waiting; None if someone holds it.

        Raises:
            OSError: ENOTSUP or ENOLCK where the file system has no locks.
        """

    def lock_file(self, path: str) -> LockHandle | None:
        """As `lock_dir`, of a regular file."""

    @property
    def findings(self) -> Findings:
        """What the last `probe` has found."""

    def probe(self, folder: str) -> None:
        """Try in an empty private directory what a file system does that is not known to be local."""

    def free_bytes(self, path: str) -> int:
        """Bytes that this user may still write on the file system of `path`."""

    def fs_type(self, path: str) -> str:
        """Name of the file system type, "0x..." for one unknown here, "" where the system does not tell."""

    async def open_write(self, path: str, size_bytes: int, *, direct: bool, executor: Executor) -> WritableFile:
        """Make a new file of (later) `size_bytes` and open it for parallel writes.

        Falls back to buffered where O_DIRECT is refused. Space is reserved where that lets direct writes run in
        parallel (ext4, xfs). On failure nothing is left behind.

        Raises:
            WriteError, OutOfSpaceError: with path and errno.
        """
