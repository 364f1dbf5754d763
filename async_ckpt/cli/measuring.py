"""Measures this machine with the package's own writer: disk modes, checksums, memory. Plain numbers, no printing, no
torch.

Every file is written in full, synced and deleted again; what a file needs is timed from the first chunk to the end of
its sync, in memory that was touched before, as in a running engine.
"""

from __future__ import annotations

import ctypes
import functools
import os
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..format.checksum import crc32
from ..format.chunk import Chunk
from ..host.facts import available_memory_bytes
from ..host.memory import address_of, move, region
from ..storage.delete import sweep
from ..storage.filesystem import FileSystem
from ..storage.private_dirs import make_private, remove_tree
from ..writer.pool import WriterPool

CHUNK_BYTES = 16 << 20
_NUM_CHUNKS = 16
_SMALLEST_FILE_BYTES = 64 << 20
_LARGEST_FILE_BYTES = 4 << 30
IoMode = Literal["direct", "buffered"]


@dataclass(frozen=True, slots=True)
class DiskResult:
    """One way of writing: rates of single files, written and synced, in bytes per second; `direct` as it turned out."""

    io_mode: str
    num_writers: int
    direct: bool
    rates_bytes_per_s: tuple[float, ...]

    @property
    def median_bytes_per_s(self) -> float:
        """The middle one: single files vary, the first most."""
        return sorted(self.rates_bytes_per_s)[len(self.rates_bytes_per_s) // 2]


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """Rates in bytes per second on one core."""

    copy_warm_bytes_per_s: float
    copy_fresh_bytes_per_s: float
    crc_bytes_per_s: float
    available_bytes: int


def measure_memory(seconds: float) -> MemoryResult:
    """Copy into touched memory, copy into fresh memory, CRC-32; takes about `seconds`."""
    num_bytes = min(256 << 20, available_memory_bytes() // 8)
    source, target = _touched(num_bytes), _touched(num_bytes)

    def rate(work: Callable[[], object]) -> float:
        work()
        started, rounds = time.perf_counter(), 0
        while rounds == 0 or time.perf_counter() - started < seconds / 3:
            work()
            rounds += 1
        return rounds * num_bytes / (time.perf_counter() - started)

    def copy(target: memoryview) -> None:
        move(address_of(target), address_of(source), num_bytes)

    return MemoryResult(
        copy_warm_bytes_per_s=rate(lambda: copy(target)),
        copy_fresh_bytes_per_s=rate(lambda: copy(region(num_bytes))),
        crc_bytes_per_s=rate(lambda: crc32(source)),
        available_bytes=available_memory_bytes(),
    )


def _touched(num_bytes: int) -> memoryview:
    memory = region(num_bytes)
    ctypes.memset(address_of(memory), 0x5A, num_bytes)
    return memory


class DiskMeasurement:
    """Writes test files into a private directory below `folder`, which is swept first; a context, which removes them.

    Raises:
        ConfigError: too little free space to measure anything. WriteError: the disk refuses.
    """

    def __init__(self, folder: str) -> None:
        self._filesystem = FileSystem()
        self.free_bytes = self._filesystem.free_bytes(folder)
        self.fs_type = self._filesystem.fs_type(folder)
        if self.free_bytes < 4 * _SMALLEST_FILE_BYTES:
            raise ConfigError(f"only {self.free_bytes} bytes are free in {folder!r}: too little to measure its speed")
        sweep(self._filesystem, folder)
        # Rubbish from the beginning: any sweep removes it once this process is gone.
        self._folder = make_private(self._filesystem, folder, "bench", "trash")
        self._free_chunks: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        arena = _touched(_NUM_CHUNKS * CHUNK_BYTES)
        for start in range(0, len(arena), CHUNK_BYTES):
            self._free_chunks.put(arena[start : start + CHUNK_BYTES])

    def __enter__(self) -> DiskMeasurement:
        return self

    def __exit__(self, *exc: object) -> None:
        remove_tree(self._filesystem, self._folder)

    def run(self, plan: list[tuple[IoMode, int]], seconds: float) -> Iterator[DiskResult]:
        """One result per (mode, writers); file sizes are chosen so that all take about `seconds` together."""
        probe = self.measure("buffered", 2, _SMALLEST_FILE_BYTES, 0.0)
        wanted = int(probe.median_bytes_per_s * seconds / (len(plan) * 3 + 1))
        most = min(_LARGEST_FILE_BYTES, self.free_bytes // 4)
        size_bytes = max(_SMALLEST_FILE_BYTES, min(wanted, most)) // CHUNK_BYTES * CHUNK_BYTES
        for io_mode, num_writers in plan:
            yield self.measure(io_mode, num_writers, size_bytes, seconds / len(plan))

    def measure(self, io_mode: IoMode, num_writers: int, size_bytes: int, seconds: float = 0.0) -> DiskResult:
        """Write files of `size_bytes` in one way, for about `seconds`, one at least; blocks."""
        pool = WriterPool(self._filesystem, num_writers=num_writers, io_mode=io_mode, name="async-ckpt-bench")
        rates: list[float] = []
        direct = False
        try:
            started = time.perf_counter()
            while not rates or (time.perf_counter() - started < seconds and len(rates) < 9):
                took_s, direct = self._write(pool, f"{self._folder}/{io_mode}-{num_writers}-{len(rates)}", size_bytes)
                rates.append(size_bytes / took_s)
        finally:
            pool.close(60.0)
        return DiskResult(io_mode, num_writers, direct, tuple(rates))

    def _write(self, pool: WriterPool, path: str, size_bytes: int) -> tuple[float, bool]:
        started = time.perf_counter()
        file = pool.open_file(path, size_bytes=size_bytes, seal=lambda _, view: crc32(view))
        for offset in range(0, size_bytes, CHUNK_BYTES):
            chunk = self._free_chunks.get()
            release = functools.partial(self._free_chunks.put, chunk)
            file.submit(Chunk(offset, min(CHUNK_BYTES, size_bytes - offset), chunk, release))
        written = file.done.result()
        took_s = time.perf_counter() - started
        os.unlink(path)
        return took_s, written.direct


def best(results: list[DiskResult]) -> DiskResult:
    """The fewest writers within 5 % of the fastest: more only disturb the training."""
    fastest = max(result.median_bytes_per_s for result in results)
    good = [result for result in results if result.median_bytes_per_s >= 0.95 * fastest]
    return min(good, key=lambda result: (result.num_writers, -result.median_bytes_per_s))
