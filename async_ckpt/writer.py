"""The asyncio writer pool: one daemon thread with one event loop puts staging chunks on disk."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from .filesystem import FileSystem
from .metrics import Span

T = TypeVar("T")


@dataclass(slots=True)
class Chunk:
    """One unit of work: the extent `[offset, offset + nbytes)` of a file, in staging memory.

    `buffer` is page-aligned and holds at least `nbytes` rounded up to 4096; the writer may zero what lies between.
    The writer touches it only after `ready` (a lazy copy) has ended; an exception in `ready` fails the file.
    `release` is called exactly once, on any thread, after the last touch: written or given up.
    """

    offset: int
    nbytes: int
    buffer: memoryview
    ready: Future[None] | None
    release: Callable[[], None]


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What is on disk, synced: `extent_crc32[k]` covers bytes `[k * extent_bytes, (k + 1) * extent_bytes)`.

    `crc_s`, `write_s` are sums over chunks and may exceed wall time; `durable_s` is the `time.perf_counter()` at
    which the file was synced.
    """

    path: str
    size_bytes: int
    extent_bytes: int
    extent_crc32: tuple[int, ...]
    direct: bool
    crc_s: float
    write_s: float
    sync_s: float
    durable_s: float


class FileWrite:
    """One file on its way to the disk. All methods may be called from any thread and never block."""

    done: Future[WrittenFile]

    def submit(self, chunk: Chunk) -> None:
        """Hand over the next chunk (ascending, without gaps, equal sizes except the last).

        The chunk is taken over in every case, and released exactly once. A file that has failed takes no harm from
        further chunks: they are released, and `done` has the failure.

        Raises:
            TransactionStateError: out of order or past the end (this fails the file), or in a forked child.
        """
        raise NotImplementedError

    def abort(self, error: BaseException) -> None:
        """Give the file up: `done` fails with `error` unless it has ended; chunks in flight are waited for, then released."""
        raise NotImplementedError


class WriterPool:
    """Writes files from chunks; every method may be called from any thread except the pool's own."""

    def __init__(
        self,
        filesystem: FileSystem,
        *,
        num_writers: int | Literal["auto"] = "auto",
        io_mode: Literal["auto", "direct", "buffered"] = "auto",
        on_span: Callable[[Span], None] | None = None,
        name: str = "async-ckpt",
    ) -> None:
        raise NotImplementedError

    def open_file(
        self,
        location: str | Future[str],
        *,
        size_bytes: int,
        seal: Callable[[int, memoryview], int],
        make_parents: bool = False,
        tag: str = "",
    ) -> FileWrite:
        """Start a file of `size_bytes` bytes at `location` (or where that future says, once it is known)."""
        raise NotImplementedError

    def submit_copy(self, fn: Callable[[], T]) -> Future[T]:
        """Run `fn` on the copy thread, first in first out."""
        raise NotImplementedError

    def run(self, coro: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop."""
        raise NotImplementedError

    async def step(self, fn: Callable[[], T]) -> T:
        """On the loop: run a blocking step in one of the pool's daemon threads."""
        raise NotImplementedError

    @property
    def num_queued(self) -> int:
        """Chunks submitted and not yet released."""
        raise NotImplementedError

    def waiting_for(self) -> str:
        """What the oldest unfinished file waits for, in words."""
        raise NotImplementedError

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for every file and coroutine, then stop the threads. Files that lack chunks fail."""
        raise NotImplementedError
