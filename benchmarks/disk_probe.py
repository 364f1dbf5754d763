"""The writer pool side by side with fio on one disk: seconds until synced, alternating, warm source memory.

    python -m benchmarks.disk_probe --directory runs/probe --repeats 5 --json probe.json

The pool's figure runs from `open_file` to synced (opening, reserving space and CRC included); fio's is its own
runtime, which leaves out opening and reserving. Modes marked "+" are the pool's. `share` is pool / best fio mode.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from async_ckpt.format.checksum import crc32
from async_ckpt.storage.filesystem import LocalFileSystem
from async_ckpt.writer.chunks import Chunk, WrittenFile
from async_ckpt.writer.pool import WriterPool
from benchmarks.environment import describe
from benchmarks.limits import fio_buffered_fsync, fio_direct_depth_4, fio_direct_depth_16

MIB = 1 << 20
MAX_ARENA_BYTES = 4096 * MIB
FIO_MODES = {"fio_direct_4": fio_direct_depth_4, "fio_direct_16": fio_direct_depth_16, "fio_buffered": fio_buffered_fsync}


class Ticker(threading.Thread):
    """Longest time in which this thread, which wants the GIL every half millisecond, did not get it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.longest_s = 0.0
        self._ended = threading.Event()

    def run(self) -> None:
        last = time.perf_counter()
        while not self._ended.wait(0.0005):
            now = time.perf_counter()
            self.longest_s = max(self.longest_s, now - last)
            last = now

    def stop(self) -> float:
        self._ended.set()
        self.join()
        return self.longest_s


def warm_arena(num_bytes: int) -> memoryview:
    """Touched memory in huge pages where there are any, filled with bytes that do not compress."""
    arena = mmap.mmap(-1, min(num_bytes, MAX_ARENA_BYTES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)
    view, block = memoryview(arena), os.urandom(MIB)
    for offset in range(0, len(view), MIB):
        view[offset : offset + MIB] = block
    return view


def write_once(pool: WriterPool, path: Path, num_bytes: int, chunk_bytes: int, arena: memoryview) -> tuple[float, WrittenFile]:
    """Seconds until synced."""
    started_s = time.perf_counter()
    file = pool.open_file(str(path), size_bytes=num_bytes, seal=lambda _, view: crc32(view))
    for offset in range(0, num_bytes, chunk_bytes):
        low = offset % len(arena)
        nbytes = min(chunk_bytes, num_bytes - offset)
        file.submit(Chunk(offset, nbytes, arena[low : low + nbytes], None, lambda: None))
    written = file.done.result()
    path.unlink()
    return written.durable_s - started_s, written


def probe(
    directory: Path, num_bytes: int, chunk_bytes: int, repeats: int, modes: dict[str, dict[str, Any]], fio_modes: list[str]
) -> dict[str, Any]:
    """All modes in turn, `repeats` times after one warm-up round; each pool lives through all rounds, as an engine's does."""
    arena = warm_arena(num_bytes)
    pools = {name: WriterPool(LocalFileSystem(), name=f"probe-{name}", **options) for name, options in modes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*modes, *fio_modes)}
    stalls: dict[str, float] = {}
    direct: dict[str, list[bool]] = {name: [] for name in modes}
    for k in range(repeats + 1):
        names = list(seconds) if k % 2 else list(reversed(seconds))
        for name in names:
            if name in FIO_MODES:
                taken_s = float(FIO_MODES[name](directory, num_bytes)["durable_s"])
            else:
                ticker = Ticker()
                ticker.start()
                taken_s, written = write_once(pools[name], directory / "pool.dat", num_bytes, chunk_bytes, arena)
                stalls[name] = max(stalls.get(name, 0.0), ticker.stop())
                direct[name].append(written.direct)
            if k:
                seconds[name].append(taken_s)
    for pool in pools.values():
        pool.close(60)
    best = min(fio_modes, key=lambda name: statistics.median(seconds[name]))
    best_s = statistics.median(seconds[best])
    return {
        "num_bytes": num_bytes,
        "chunk_bytes": chunk_bytes,
        "seconds": seconds,
        "best_fio": best,
        "share": {name: best_s / statistics.median(seconds[name]) for name in modes},
        "direct": direct,
        "longest_gil_wait_s": stalls,
    }


def table(result: dict[str, Any]) -> str:
    """One size as text."""
    gib = result["num_bytes"] / (1 << 30)
    lines = [f"{gib:g} GiB, chunks of {result['chunk_bytes'] // MIB} MiB, best fio mode: {result['best_fio']}"]
    for name, values in result["seconds"].items():
        middle = statistics.median(values)
        row = f"  {name:16} {middle:7.3f} s  {gib / middle:5.2f} GiB/s  (min {min(values):.3f}, max {max(values):.3f})"
        if name in result["share"]:
            row += f"  share {result['share'][name]:.2f}  longest GIL wait {result['longest_gil_wait_s'][name] * 1e3:.1f} ms"
        lines.append(row)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=None, help="where to write (default: a temporary directory)")
    parser.add_argument("--sizes-mib", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--chunk-mib", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--modes", nargs="+", default=["auto"], help="auto, buffered, direct or direct:DEPTH")
    parser.add_argument("--fio", nargs="+", choices=list(FIO_MODES), default=list(FIO_MODES), help="the modes to compare with")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    modes: dict[str, dict[str, Any]] = {}
    for text in arguments.modes:
        io_mode, _, depth = text.partition(":")
        modes[f"+{text}"] = {"io_mode": io_mode, "num_writers": int(depth) if depth else "auto"}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        results = []
        for size_mib in arguments.sizes_mib:
            results.append(probe(Path(scratch), size_mib * MIB, arguments.chunk_mib * MIB, arguments.repeats, modes, arguments.fio))
            print(table(results[-1]), flush=True)
        report = {"environment": describe(Path(scratch)), "results": results}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
