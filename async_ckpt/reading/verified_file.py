"""Reads committed files in parallel, checks every extent against the manifest, and hands the bytes on; no torch here.

Guarantees:
- With `check`, `view`, `keep` and `stream` never return before the CRC of every byte they handed on was compared.
- The first failure stops all workers and is raised; no thread and no descriptor is left behind.
- Worker memory is `num_threads` blocks of 2 MiB (8 MiB where a store is read); only what `keep` was told to keep stays.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .. import metrics
from ..errors import CheckpointError, CorruptCheckpointError
from ..format.checksum import crc32, crc32_combine
from ..format.manifest import FileEntry
from ..host.memory import region
from ..storage.filesystem import ReadableFile
from ..threads.executor import run_on_threads
from ..threads.locks import Lock
from .errors import DAMAGE_ERRNOS, ExtentMismatch, ReadError

BLOCK_BYTES = 2 << 20
"""One read, one huge page: still in the core's cache when its CRC is taken."""
DEFAULT_NUM_THREADS = 8
"""Four reads in flight fill a fast disk's queue; the others' blocks are checked and moved."""

Consume = Callable[[int, memoryview], None]
"""Called on a worker thread with a file offset and the bytes there; they are only valid during the call."""
Lent = tuple[memoryview, Callable[[], None]]
"""Page-aligned memory, and what gives it back."""
MemorySource = Callable[[int], "Lent | None"]
"""Lends memory of at least so many bytes that was touched before (fresh memory is slower than the disk), or None."""


def borrow(lend: MemorySource | None, num_bytes: int) -> Lent:
    """Memory of at least so many bytes: lent, or fresh where nobody lends any."""
    lent = None if lend is None else lend(num_bytes)
    return (region(num_bytes), lambda: None) if lent is None else lent


class Buffers(NamedTuple):
    """What the blocks of a file are read into."""

    new: Callable[[int], memoryview] | None = region
    """Gives page-aligned memory; None where the file has a `pread(offset, num_bytes)` that gives what it reads in
    memory of its own, read-only."""
    num_bytes: int = BLOCK_BYTES
    """The size of one read; more where the way to the data is long."""
    are_reused: bool = True
    """Whether a thread reads all its blocks into one buffer, or asks for one each time."""


@dataclass(slots=True)
class _Block:
    """Some bytes of whole extents, or of a part of one."""

    file: VerifiedFile
    offset: int
    num_bytes: int
    to: Buffers
    memory: memoryview | None = None
    loaded: bool = False


class VerifiedFile:
    """One open file and the CRCs of its extents. One caller at a time; owns `file` and closes it.

    `on_read(name, bytes just read, bytes of the file)` is called on the threads that read, and there `on_damage` is
    told about an extent that is not as committed, or that the disk cannot give; without it, the first such error is
    raised.
    """

    def __init__(
        self,
        file: ReadableFile,
        entry: FileEntry,
        *,
        check: bool,
        num_threads: int | None = None,
        lend: MemorySource | None = None,
        on_read: metrics.ReadProgress | None = None,
        on_damage: Callable[[VerifiedFile, int, CheckpointError], None] | None = None,
    ) -> None:
        self.entry = entry
        self.name = file.path
        self.buffers = Buffers(None if hasattr(file, "pread") else region, getattr(file, "block_bytes", BLOCK_BYTES))
        self.map_path = file.map_path
        """A path to this very file while it is open here, whoever has its name by now."""
        self.size_bytes = file.size_bytes
        self.extent_bytes = entry.extent_bytes
        self.num_extents = -(-self.size_bytes // self.extent_bytes) if self.size_bytes else 0
        self.check = check
        self.lend = lend
        self.looks: tuple[Consume, ...] = ()
        """See `show_to`."""
        self.on_read, self.on_damage = on_read or metrics.read_listener(), on_damage
        self.read_bytes = 0
        """How many bytes the disk or store was asked for so far."""
        self._lock = Lock()
        self._file = file
        self._num_threads = num_threads or DEFAULT_NUM_THREADS
        self._kept: dict[int, Lent] = {}
        self._verified: set[int] = set()

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
        first = offset // self.extent_bytes
        return range(first, -(-(offset + num_bytes) // self.extent_bytes) if num_bytes else first)

    def extent_range(self, extent: int) -> tuple[int, int]:
        """First byte of an extent and the byte after its last."""
        return extent * self.extent_bytes, min(self.size_bytes, (extent + 1) * self.extent_bytes)

    def keep(self, extents: Iterable[int]) -> None:
        """Read and verify these extents and hold them in memory, so that `view` and `stream` need not read them
        again."""
        wanted: dict[int, Lent] = {}
        try:
            blocks: list[_Block] = []
            for extent in extents:
                if extent not in self._kept and extent not in wanted:
                    first, end = self.extent_range(extent)
                    wanted[extent] = borrow(self.lend, end - first)
                    blocks += self._blocks(first, end, self.buffers, wanted[extent][0])
            _Reading(blocks, None, self._num_threads).run()
        except BaseException:
            for _, give_back in wanted.values():
                give_back()
            raise
        self._kept.update(wanted)

    def drop(self, extents: Iterable[int]) -> None:
        """Forget kept extents; that they were verified is remembered."""
        for extent in list(extents):
            if extent in self._kept:
                self._kept.pop(extent)[1]()

    def kept(self) -> list[int]:
        """Indices of the kept extents, oldest first."""
        return list(self._kept)

    def is_kept(self, extent: int) -> bool:
        """Whether the extent is in memory."""
        return extent in self._kept

    def view(self, offset: int, num_bytes: int) -> memoryview:
        """Verified bytes of the file; keeps the extents they lie in."""
        self._check_inside(offset, num_bytes)
        extents = self.extents_of(offset, num_bytes)
        self.keep(extents)
        parts = []
        for extent in extents:
            low, high = self.extent_range(extent)
            parts.append(self._kept[extent][0][max(offset, low) - low : min(offset + num_bytes, high) - low])
        return parts[0] if len(parts) == 1 else memoryview(b"".join(parts))

    def read(self, offset: int, num_bytes: int) -> bytes:
        """A copy of what `view` gives."""
        return bytes(self.view(offset, num_bytes))

    def unverified(self, offset: int, num_bytes: int) -> bytes:
        """Bytes as they are on disk, compared with nothing: for headers that are shown, and for telling what is
        damaged."""
        self._check_inside(offset, num_bytes)
        data = bytearray(num_bytes)
        self.read_block(memoryview(data), offset, num_bytes)
        return bytes(data)

    def show_to(self, *looks: Consume) -> None:
        """From now on, let `looks` see all bytes that are read, before they are handed on."""
        self.looks += looks

    def stream(
        self, consume: Consume | None, extents: Iterable[int] | None = None, buffers: Buffers | None = None
    ) -> None:
        """Hand every byte of `extents` (default: all) to `consume`, in parallel and in no order; blocks until done.
        Raises CorruptCheckpointError: a CRC differs. `consume` may have seen the bytes already: it must write only to
        memory that nobody uses yet, or bytes that `verify_rest` has seen."""
        wanted = range(self.num_extents) if extents is None else extents
        blocks = list(self.blocks(wanted, buffers, with_kept=consume is not None))
        _Reading(blocks, consume, self._num_threads).run()

    def verify_rest(self) -> None:
        """Read and verify every extent that was not verified yet; does nothing without `check`."""
        if self.check:
            self.stream(None, [extent for extent in range(self.num_extents) if extent not in self._verified])

    def blocks(
        self, extents: Iterable[int], buffers: Buffers | None = None, *, with_kept: bool = False
    ) -> Iterator[_Block]:
        """What to read for these extents, neighbours together; `with_kept`: also what is in memory already."""
        to = buffers or self.buffers
        first = end = 0
        for extent in extents:
            low, high = self.extent_range(extent)
            kept = self._kept.get(extent)
            if low != end or kept is not None:
                yield from self._blocks(first, end, to)
                first, end = low, low
            if kept is None:
                end = high
            else:
                first = end = high
                if with_kept:
                    yield from self._blocks(low, high, to, kept[0], loaded=True)
        yield from self._blocks(first, end, to)

    def read_block(self, memory: memoryview | None, offset: int, num_bytes: int) -> memoryview:
        """What the disk holds, in `memory` or (None) in the file's own. Any thread. Raises ReadError,
        CorruptCheckpointError (the file has ended)."""
        with self._lock:
            self.read_bytes += num_bytes
        try:
            if memory is None:
                return self._file.pread(offset, num_bytes)  # type: ignore[attr-defined, no-any-return]
            self._file.pread_into(memory, offset)
            return memory
        except CheckpointError:
            raise
        except OSError as error:
            raise ReadError(error, path=self.name, offset=offset) from error

    def compare(self, extent: int, crc: int) -> None:
        """Note that an extent has this CRC. Raises ExtentMismatch."""
        if crc != self.entry.extent_crc32[extent]:
            raise ExtentMismatch(self.name, extent, self.extent_range(extent))
        self._verified.add(extent)

    def _check_inside(self, offset: int, num_bytes: int) -> None:
        if offset < 0 or num_bytes < 0 or offset + num_bytes > self.size_bytes:
            raise CorruptCheckpointError(
                f"{self.name}: {num_bytes} bytes at {offset} lie outside the file", path=self.name
            )

    def _blocks(
        self, first: int, end: int, to: Buffers, memory: memoryview | None = None, loaded: bool = False
    ) -> Iterator[_Block]:
        for offset in range(first, end, to.num_bytes):
            num_bytes = min(to.num_bytes, end - offset)
            part = None if memory is None else memory[offset - first :][:num_bytes]
            yield _Block(self, offset, num_bytes, to, part, loaded)


def check_files(files: Iterable[VerifiedFile], *, num_threads: int | None = None) -> None:
    """Compare all of `files` with their CRCs; blocks until every byte was read. Raises OSError: a shortage of this
    process or machine kept a file from being read."""
    blocks = [block for file in files for block in file.blocks(range(file.num_extents))]
    _Reading(blocks, None, num_threads or DEFAULT_NUM_THREADS).run()


class _Reading:
    """One pass over some blocks by a few threads."""

    def __init__(self, blocks: list[_Block], consume: Consume | None, num_threads: int) -> None:
        self._num_workers = max(1, min(num_threads, len(blocks)))
        self._pending = iter(blocks)
        self._consume = consume
        self._lock = Lock()
        self._failed = threading.Event()
        self._sums: dict[tuple[VerifiedFile, int], list[tuple[int, int, int]]] = {}
        """For extents that are read in parts: offset, CRC and size of each part that was read."""

    def run(self) -> None:
        if self._num_workers == 1:
            self._work()
            return
        # An interrupt must not wait for the rest of the file, but for the blocks that are being read into memory.
        run_on_threads("async-ckpt-read", self._num_workers, self._work, stop=self._failed.set)

    def _work(self) -> None:
        buffer: memoryview | None = None
        while not self._failed.is_set():
            with self._lock:
                block = next(self._pending, None)
            if block is None:
                return
            try:
                memory, to = block.memory, block.to
                if memory is None and to.new is not None:
                    if buffer is None or not to.are_reused:
                        buffer = to.new(to.num_bytes)
                    memory = buffer[: block.num_bytes]
                self._process(block, memory)
            except BaseException:
                self._failed.set()
                raise

    def _process(self, block: _Block, memory: memoryview | None) -> None:
        file = block.file
        extents = file.extents_of(block.offset, block.num_bytes)
        if not block.loaded:
            try:
                memory = file.read_block(memory, block.offset, block.num_bytes)
            except (CorruptCheckpointError, ReadError) as error:
                if file.on_damage is None or (isinstance(error, ReadError) and error.errno not in DAMAGE_ERRNOS):
                    raise
                for extent in extents:
                    file.on_damage(file, extent, error)
            else:
                for extent in extents if file.check else ():
                    self._sum(block, memory, extent)
            if file.on_read is not None:
                file.on_read(file.name, block.num_bytes, file.size_bytes)
        for consume in file.looks if self._consume is None else (*file.looks, self._consume):
            if memory is not None:
                consume(block.offset, memory)

    def _sum(self, block: _Block, memory: memoryview, extent: int) -> None:
        """Take the CRC of what the block has of an extent, and compare it once all of the extent was read."""
        low, high = block.file.extent_range(extent)
        first, end = max(low, block.offset), min(high, block.offset + block.num_bytes)
        crc = crc32(memory[first - block.offset : end - block.offset])
        if (first, end) != (low, high):
            with self._lock:
                parts = self._sums.setdefault((block.file, extent), [])
                parts.append((first, crc, end - first))
                if sum(num_bytes for _, _, num_bytes in parts) < high - low:
                    return
                del self._sums[block.file, extent]
            crc = 0
            for _, part, num_bytes in sorted(parts):
                crc = crc32_combine(crc, part, num_bytes)
        try:
            block.file.compare(extent, crc)
        except ExtentMismatch as mismatch:
            if block.file.on_damage is None:
                raise
            block.file.on_damage(block.file, extent, mismatch)
