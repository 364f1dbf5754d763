"""Reads one committed file in parallel, checking every extent against the manifest; no torch here.

Guarantees:
- With `check`, `view`, `keep` and `stream` never return before the CRC of every byte they handed on was compared.
- The first failure stops all workers and is raised; no thread and no descriptor is left behind.
- Worker memory is `num_threads * BLOCK_BYTES`; only what `keep` was told to keep stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from ..checksum import crc32, crc32_combine
from ..errors import CheckpointError, CorruptCheckpointError
from ..host.memory import region
from ..progress import read_progress
from ..threads.locks import Lock, uninterrupted
from .read_errors import ExtentMismatch, ReadError

BLOCK_BYTES = 2 << 20
"""One read, one huge page: still in the core's cache when its CRC is taken."""
DEFAULT_NUM_THREADS = 8
"""Four reads in flight fill a fast disk's queue, while the others' blocks are checked and moved."""

Consume = Callable[[int, memoryview], None]
"""Called on a worker thread with a file offset and the bytes there; they are only valid during the call."""


Lent = tuple[memoryview, Callable[[], None]]
"""Page-aligned memory, and what gives it back."""
MemorySource = Callable[[int], "Lent | None"]
"""Lends memory of at least so many bytes that was touched before (fresh memory is slower than the disk), or None."""


class ReadableFile(Protocol):
    """What this module needs of an open file (`filesystem.ReadableFile` is one)."""

    @property
    def size_bytes(self) -> int: ...

    def pread_into(self, buffer: memoryview, offset: int) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Block:
    offset: int
    num_bytes: int
    extent: int
    kept: memoryview | None = None
    loaded: bool = False
    crc: int = 0


class VerifiedFile:
    """One open file and the CRCs of its extents. One caller at a time; owns `file` and closes it.

    `new_buffer(num_bytes)` may be set to where the workers' buffers come from (pinned memory for a GPU), page-aligned.
    """

    def __init__(
        self,
        file: ReadableFile,
        *,
        name: str,
        extent_bytes: int,
        extent_crc32: tuple[int, ...],
        check: bool,
        num_threads: int = DEFAULT_NUM_THREADS,
        lend: MemorySource | None = None,
    ) -> None:
        self.name = name
        self.size_bytes = file.size_bytes
        self.extent_bytes = extent_bytes
        self.num_extents = -(-self.size_bytes // extent_bytes) if self.size_bytes else 0
        self.check = check
        self.new_buffer: Callable[[int], memoryview] = region
        self._file = file
        self._crcs = extent_crc32
        self._num_threads = max(1, num_threads)
        self._on_read = read_progress.get()
        self._kept: dict[int, memoryview] = {}
        self.lend = lend
        self._give_back: dict[int, Callable[[], None]] = {}
        self._verified: set[int] = set()
        if check and len(extent_crc32) != self.num_extents:
            raise CorruptCheckpointError(
                f"{name}: the manifest holds {len(extent_crc32)} extent checksums, the file has {self.num_extents} extents", path=name
            )

    def __enter__(self) -> VerifiedFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor and forget the kept extents; may be called twice."""
        self.drop(self.kept())
        self._file.close()

    def extents_of(self, offset: int, num_bytes: int) -> range:
        """Indices of the extents that hold `num_bytes` bytes from `offset`."""
        return range(
            offset // self.extent_bytes, -(-(offset + num_bytes) // self.extent_bytes) if num_bytes else offset // self.extent_bytes
        )

    def extent_range(self, extent: int) -> tuple[int, int]:
        """First byte of an extent and the byte after its last."""
        return extent * self.extent_bytes, min(self.size_bytes, (extent + 1) * self.extent_bytes)

    def keep(self, extents: Iterable[int]) -> None:
        """Read and verify these extents and hold them in memory, so that `view` and `stream` need not read them again."""
        wanted: dict[int, memoryview] = {}
        try:
            for extent in extents:
                if extent not in self._kept:
                    wanted[extent] = self._new_extent(extent)
            self._run([block for extent, memory in wanted.items() for block in self._blocks(extent, memory)], None)
        except BaseException:
            self._return(wanted)
            raise
        self._kept.update(wanted)

    def drop(self, extents: Iterable[int]) -> None:
        """Forget kept extents; that they were verified is remembered."""
        dropped = list(extents)
        for extent in dropped:
            self._kept.pop(extent, None)
        self._return(dropped)

    def kept(self) -> list[int]:
        """Indices of the kept extents, oldest first."""
        return list(self._kept)

    def is_kept(self, extent: int) -> bool:
        """Whether the extent is in memory."""
        return extent in self._kept

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """Verified bytes of the file; keeps the extents they lie in."""
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.size_bytes:
            raise CorruptCheckpointError(f"{self.name}: {num_bytes} bytes at {offset} lie outside the file", path=self.name)
        extents = self.extents_of(offset, num_bytes)
        self.keep(extents)
        parts = [self._kept_part(extent, offset, offset + num_bytes) for extent in extents]
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def read(self, offset: int, num_bytes: int) -> bytes:
        """As `view`, copied."""
        return bytes(self.view(offset, num_bytes))

    def unverified(self, offset: int, num_bytes: int) -> bytes:
        """Bytes as they are on disk, compared with nothing: only for telling what is damaged, or laid out by nobody's torch."""
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.size_bytes:
            raise CorruptCheckpointError(f"{self.name}: {num_bytes} bytes at {offset} lie outside the file", path=self.name)
        data = bytearray(num_bytes)
        try:
            self._file.pread_into(memoryview(data), offset)
        except CheckpointError:
            raise
        except OSError as error:
            raise ReadError(error, path=self.name, offset=offset) from error
        return bytes(data)

    def stream(self, consume: Consume | None, extents: Iterable[int] | None = None) -> None:
        """Hand every byte of `extents` (default: all) to `consume`, in parallel and in no order; blocks until done.

        Raises:
            CorruptCheckpointError: a CRC differs. `consume` may have seen the bytes already: it must write
                only to memory that nobody uses yet, or bytes that `verify_rest` has seen.
        """
        todo: list[_Block] = []
        for extent in range(self.num_extents) if extents is None else extents:
            kept = self._kept.get(extent)
            if kept is not None and consume is None:
                continue
            todo += self._blocks(extent, kept, loaded=kept is not None)
        self._run(todo, consume)

    def verify_rest(self) -> None:
        """Read and verify every extent that was not verified yet; does nothing without `check`."""
        if self.check:
            self.stream(None, [extent for extent in range(self.num_extents) if extent not in self._verified])

    def _new_extent(self, extent: int) -> memoryview:
        first, end = self.extent_range(extent)
        lent = self.lend(end - first) if self.lend is not None else None
        if lent is None:
            return region(end - first)
        self._give_back[extent] = lent[1]
        return lent[0][: end - first]

    def _return(self, extents: Iterable[int]) -> None:
        for extent in extents:
            give_back = self._give_back.pop(extent, None)
            if give_back is not None:
                give_back()

    def _kept_part(self, extent: int, first: int, end: int) -> memoryview:
        low, high = self.extent_range(extent)
        return self._kept[extent][max(first, low) - low : min(end, high) - low]

    def _blocks(self, extent: int, memory: memoryview | None, loaded: bool = False) -> list[_Block]:
        first, end = self.extent_range(extent)
        blocks = []
        for offset in range(first, end, BLOCK_BYTES):
            num_bytes = min(BLOCK_BYTES, end - offset)
            part = None if memory is None else memory[offset - first : offset - first + num_bytes]
            blocks.append(_Block(offset, num_bytes, extent, part, loaded))
        return blocks

    def _run(self, blocks: list[_Block], consume: Consume | None) -> None:
        num_workers = min(self._num_threads, len(blocks))
        pending = iter(blocks)
        lock = Lock()
        failed = threading.Event()

        def work() -> None:
            buffer: memoryview | None = None
            while not failed.is_set():
                with lock:
                    block = next(pending, None)
                if block is None:
                    return
                if block.kept is None and buffer is None:
                    buffer = self.new_buffer(min(BLOCK_BYTES, self.extent_bytes))
                try:
                    self._process(block, buffer, consume)
                except BaseException:
                    failed.set()
                    raise

        if num_workers <= 1:
            work()
        else:
            pool = ThreadPoolExecutor(num_workers, thread_name_prefix="async-ckpt-read")
            try:
                for result in [pool.submit(work) for _ in range(num_workers)]:
                    result.result()
            finally:
                # An interrupt in this thread must not wait for the rest of the file, but for the blocks that are being read into memory.
                failed.set()
                uninterrupted(pool.shutdown)
        self._compare(blocks)

    def _process(self, block: _Block, buffer: memoryview | None, consume: Consume | None) -> None:
        memory = block.kept
        if memory is None:
            assert buffer is not None
            memory = buffer[: block.num_bytes]
        if not block.loaded:
            try:
                self._file.pread_into(memory, block.offset)
            except CheckpointError:
                raise
            except OSError as error:
                raise ReadError(error, path=self.name, offset=block.offset) from error
            if self.check:
                block.crc = crc32(memory)
            if self._on_read is not None:
                self._on_read(self.name, block.num_bytes, self.size_bytes)
        if consume is not None:
            consume(block.offset, memory)

    def _compare(self, blocks: list[_Block]) -> None:
        crcs: dict[int, int] = {}
        for block in blocks:
            if not block.loaded:
                crcs[block.extent] = crc32_combine(crcs.get(block.extent, 0), block.crc, block.num_bytes)
        if not self.check:
            return
        for extent, crc in crcs.items():
            if crc != self._crcs[extent]:
                raise ExtentMismatch(self.name, extent, *self.extent_range(extent))
        self._verified.update(crcs)
