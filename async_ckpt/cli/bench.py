"""`async-ckpt bench`: how fast is this disk and memory, and what to configure for it."""

from __future__ import annotations

import argparse
import dataclasses
import os
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointNotFoundError, escaped
from ..observers.units import format_bytes, format_rate, format_seconds
from .output import EXIT_OK, add_json, number, print_json, print_table

if TYPE_CHECKING:
    from .measuring import DiskResult, IoMode, MemoryResult

_PLAN: tuple[tuple[IoMode, int], ...] = (
    ("buffered", 1),
    ("buffered", 4),
    ("direct", 1),
    ("direct", 2),
    ("direct", 4),
    ("direct", 8),
)
_STEP_BYTES = 64 << 20


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
    from .measuring import DiskMeasurement, best, measure_memory

    if not os.path.isdir(folder):
        raise CheckpointNotFoundError(f"{escaped(folder)!r} is not a directory")
    size_bytes = int(checkpoint_gib * 2**30) if checkpoint_gib is not None else _newest_bytes(folder)
    memory = measure_memory(seconds * 0.1)
    results: list[DiskResult] = []
    with DiskMeasurement(folder) as disk:
        for result in disk.run(list(_PLAN), seconds * 0.9):
            results.append(result)
            if not as_json:
                # One line as each is known: a minute is long.
                print(
                    f"{result.io_mode:8s} {result.num_writers} writers  {format_rate(result.median_bytes_per_s)}",
                    flush=True,
                )
    advice = _advise(memory, best(results), size_bytes)
    if as_json:
        rows = [{**dataclasses.asdict(result), "median_bytes_per_s": result.median_bytes_per_s} for result in results]
        about = {"fs_type": disk.fs_type, "free_bytes": disk.free_bytes, "memory": dataclasses.asdict(memory)}
        print_json({**about, "disk": rows, "advice": advice})
    else:
        _print(memory, results, advice, disk.fs_type)
    return EXIT_OK


def _newest_bytes(folder: str) -> int | None:
    from ..reading.catalog import Catalog

    manifests = [entry.manifest for entry in Catalog(folder).entries() if entry.manifest is not None]
    return manifests[-1].size_bytes if manifests else None


def _advise(memory: MemoryResult, disk: DiskResult, size_bytes: int | None) -> dict[str, Any]:
    rate = disk.median_bytes_per_s
    affordable = memory.available_bytes // 2
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


def _print(memory: MemoryResult, results: list[DiskResult], advice: dict[str, Any], fs_type: str) -> None:
    rows = [
        ("copy into warm staging memory", format_rate(memory.copy_warm_bytes_per_s)),
        ("copy into fresh memory (as a clone does)", format_rate(memory.copy_fresh_bytes_per_s)),
        ("CRC-32, one core", format_rate(memory.crc_bytes_per_s)),
        ("memory available", format_bytes(memory.available_bytes)),
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
