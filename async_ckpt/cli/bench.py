"""`async-ckpt bench`: how fast is this disk and memory, and what to configure for it.

Everything is measured with the package's own writer. Every file is written in full, synced and deleted again; what a
file needs is timed from the first chunk to the end of its sync, in memory that was touched before, as in a running
engine.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import os
import queue
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

from ..errors import CheckpointNotFoundError, ConfigError, escaped
from ..format.checksum import crc32
from ..format.chunk import Chunk
from ..host.facts import available_memory_bytes
from ..host.memory import address_of, move, region
from ..observers.units import format_bytes, format_rate, format_seconds
from ..reading.catalog import Catalog
from ..storage.delete import sweep
from ..storage.filesystem import FileSystem
from ..storage.private_dirs import make_private, remove_tree
from ..writer.pool import WriterPool
from .common import EXIT_OK, add_json, number, print_json, print_table

IoMode = Literal["direct", "buffered"]
_PLAN: list[tuple[IoMode, int]] = [("buffered", 1), ("buffered", 4), *(("direct", num) for num in (1, 2, 4, 8))]
_STEP_BYTES = 64 << 20
_CHUNK_BYTES = 16 << 20
_NUM_CHUNKS = 16
_SMALLEST_FILE_BYTES = 64 << 20
_LARGEST_FILE_BYTES = 4 << 30


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="a directory on the disk to measure, best your root")
    parser.add_argument(
        "--seconds", metavar="S", type=number(float, 2, 3600), default=60.0, help="how long to measure, about [60]"
    )
    parser.add_argument(
        "--checkpoint-gib",
        metavar="GIB",
        type=number(float, 1e-6, 1e6),
        help="size of your checkpoints [that of the newest there]",
    )
    add_json(parser)


def command(folder: str, seconds: float, checkpoint_gib: float | None, as_json: bool) -> int:
    """Measure disk and memory with the package's own writer, for a minute, and advise on staging_bytes, num_writers and
    io_mode.

    Writes test files (at most a quarter of the free space) into a private directory below DIR, and removes them.

    JSON: {fs_type, free_bytes, memory, disk: [one object for each mode and number of writers], advice}
    """
    if not os.path.isdir(folder):
        raise CheckpointNotFoundError(f"{escaped(folder)!r} is not a directory")
    if checkpoint_gib is None:
        sizes = [entry.manifest.size_bytes for entry in Catalog(folder).entries() if entry.manifest is not None]
    else:
        sizes = [int(checkpoint_gib * 2**30)]
    size_bytes = sizes[-1] if sizes else None
    memory = _measure_memory(seconds * 0.1)
    results: list[DiskResult] = []
    with DiskMeasurement(folder) as disk:
        for result in disk.run(seconds * 0.9):
            results.append(result)
            if not as_json:
                # One line as each is known: a minute is long.
                rate = format_rate(result.median_bytes_per_s)
                print(f"{result.io_mode:8s} {result.num_writers} writers  {rate}", flush=True)
    advice = _advise(memory["available_bytes"], _best(results), size_bytes)
    if as_json:
        about = {"fs_type": disk.fs_type, "free_bytes": disk.free_bytes, "memory": memory}
        print_json({**about, "disk": [dataclasses.asdict(result) for result in results], "advice": advice})
    else:
        _print(memory, results, advice, disk.fs_type)
    return EXIT_OK


def _measure_memory(seconds: float) -> dict[str, float]:
    """Copy into touched memory, copy into fresh memory, CRC-32, on one core; takes about `seconds`."""
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

    return {
        "copy_warm_bytes_per_s": rate(lambda: copy(target)),
        "copy_fresh_bytes_per_s": rate(lambda: copy(region(num_bytes))),
        "crc_bytes_per_s": rate(lambda: crc32(source)),
        "available_bytes": available_memory_bytes(),
    }


def _touched(num_bytes: int) -> memoryview:
    memory = region(num_bytes)
    ctypes.memset(address_of(memory), 0x5A, num_bytes)
    return memory


@dataclasses.dataclass(frozen=True, slots=True)
class DiskResult:
    """One way of writing: rates of single files, written and synced; `direct` as it turned out."""

    io_mode: IoMode
    num_writers: int
    direct: bool
    rates_bytes_per_s: tuple[float, ...]
    median_bytes_per_s: float


class DiskMeasurement:
    """Writes test files into a private directory below `folder`, which is swept first; a context, which removes them.
    Raises ConfigError: too little free space to measure anything. WriteError: the disk refuses."""

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
        arena = _touched(_NUM_CHUNKS * _CHUNK_BYTES)
        for start in range(0, len(arena), _CHUNK_BYTES):
            self._free_chunks.put(arena[start : start + _CHUNK_BYTES])

    def __enter__(self) -> DiskMeasurement:
        return self

    def __exit__(self, *exc: object) -> None:
        remove_tree(self._filesystem, self._folder)

    def run(self, seconds: float) -> Iterator[DiskResult]:
        """One result per (mode, writers); file sizes are chosen so that all take about `seconds` together."""
        probe = self.measure("buffered", 2, _SMALLEST_FILE_BYTES)
        wanted = int(probe.median_bytes_per_s * seconds / (len(_PLAN) * 3 + 1))
        most = min(_LARGEST_FILE_BYTES, self.free_bytes // 4)
        size_bytes = max(_SMALLEST_FILE_BYTES, min(wanted, most)) // _CHUNK_BYTES * _CHUNK_BYTES
        for io_mode, num_writers in _PLAN:
            yield self.measure(io_mode, num_writers, size_bytes, seconds / len(_PLAN))

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
        # Single files vary, the first most.
        return DiskResult(io_mode, num_writers, direct, tuple(rates), statistics.median_high(rates))

    def _write(self, pool: WriterPool, path: str, size_bytes: int) -> tuple[float, bool]:
        started = time.perf_counter()
        file = pool.open_file(path, size_bytes=size_bytes, seal=lambda _, view: crc32(view))
        for offset in range(0, size_bytes, _CHUNK_BYTES):
            chunk = self._free_chunks.get()
            release = functools.partial(self._free_chunks.put, chunk)
            file.submit(Chunk(offset, min(_CHUNK_BYTES, size_bytes - offset), chunk, release))
        written = file.done.result()
        took_s = time.perf_counter() - started
        os.unlink(path)
        return took_s, written.direct


def _best(results: list[DiskResult]) -> DiskResult:
    """The fewest writers within 5 % of the fastest: more only disturb the training."""
    fastest = max(result.median_bytes_per_s for result in results)
    good = [result for result in results if result.median_bytes_per_s >= 0.95 * fastest]
    return min(good, key=lambda result: (result.num_writers, -result.median_bytes_per_s))


def _advise(available_bytes: float, disk: DiskResult, size_bytes: int | None) -> dict[str, Any]:
    rate = disk.median_bytes_per_s
    affordable = int(available_bytes) // 2
    # Without a size: what the disk takes in ten seconds hides every stall up to that.
    wanted = int(10 * rate) if size_bytes is None else int(size_bytes * 1.02)
    staging_bytes = max(_STEP_BYTES, -(-min(affordable, wanted) // _STEP_BYTES) * _STEP_BYTES)
    advice: dict[str, Any] = {
        "num_writers": disk.num_writers,
        "io_mode": "direct" if disk.direct else "buffered",
        "checkpoint_bytes": size_bytes,
        "staging_bytes": staging_bytes,
    }
    if size_bytes is None:
        why = "the size of your checkpoints is not known (--checkpoint-gib): this is what the disk takes in 10 s"
    else:
        advice["durable_s"] = size_bytes / rate
        advice["stall_s"] = 0.0 if wanted <= affordable else (size_bytes - staging_bytes) / rate
        why = "one whole checkpoint fits: with a guarded optimizer, save returns at once"
        if wanted > affordable:
            waits = format_seconds(advice["stall_s"])
            why = f"a checkpoint does not fit into half of the free memory: each save waits about {waits} for the disk"
    return {**advice, "why": why}


def _print(memory: dict[str, float], results: list[DiskResult], advice: dict[str, Any], fs_type: str) -> None:
    rows = [
        ("copy into warm staging memory", format_rate(memory["copy_warm_bytes_per_s"])),
        ("copy into fresh memory (as a clone does)", format_rate(memory["copy_fresh_bytes_per_s"])),
        ("CRC-32, one core", format_rate(memory["crc_bytes_per_s"])),
        ("memory available", format_bytes(memory["available_bytes"])),
        ("file system", fs_type or "unknown"),
    ]
    for result in results:
        # A file system that refuses O_DIRECT is written through the page cache instead.
        note = "" if result.direct == (result.io_mode == "direct") else " (O_DIRECT was refused)"
        spread = f"{format_rate(min(result.rates_bytes_per_s))} to {format_rate(max(result.rates_bytes_per_s))}"
        how = f"write + fsync, {result.io_mode}, {result.num_writers} writers{note}"
        rows.append((how, f"{format_rate(result.median_bytes_per_s)}  ({spread})"))
    print()
    print_table(("measured", "value"), rows)
    staging = format_bytes(advice["staging_bytes"])
    print(f"\nadvice: staging_bytes={advice['staging_bytes']}  # {staging}; {advice['why']}")
    print(f"        num_writers={advice['num_writers']}, io_mode={advice['io_mode']!r}")
    if "durable_s" in advice:
        size, durable = format_bytes(advice["checkpoint_bytes"]), format_seconds(advice["durable_s"])
        print(f"        a checkpoint of {size} is durable after about {durable}: do not save more often than that")
