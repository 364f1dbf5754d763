"""`async-ckpt bench`: how fast is this disk and memory, and what to configure for it."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import escaped
from ..observers.units import format_bytes, format_rate, format_seconds
from .failing import NotFoundError
from .output import print_json, print_table

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


def command(
    folder: Annotated[
        str,
        typer.Argument(help="A directory on the disk to measure, best your root.", metavar="DIR", show_default=False),
    ],
    seconds: Annotated[float, typer.Option(help="How long to measure, about.", min=2, max=3600)] = 60.0,
    checkpoint_gib: Annotated[
        float | None,
        typer.Option(help="Size of your checkpoints; else that of the newest one there.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure disk and memory with the package's own writer, for a minute, and advise on staging_bytes, num_writers and
    io_mode.

    Writes test files (at most a quarter of the free space) into a private directory below DIR, and removes them.

    JSON: {fs_type, free_bytes, memory, disk: [one object for each mode and number of writers], advice}
    """
    from .measuring import DiskMeasurement, best, measure_memory

    if not os.path.isdir(folder):
        raise NotFoundError(f"{escaped(folder)!r} is not a directory")
    size_bytes = int(checkpoint_gib * 2**30) if checkpoint_gib is not None else _newest_bytes(folder)
    memory = measure_memory(seconds * 0.1)
    results: list[DiskResult] = []
    with DiskMeasurement(folder) as disk:
        for result in disk.run(list(_PLAN), seconds * 0.9):
            results.append(result)
            if not as_json:
                # One line as each is known: a minute is long.
                typer.echo(
                    f"{result.io_mode:8s} {result.num_writers} writers  {format_rate(result.median_bytes_per_s)}"
                )
        fs_type, free_bytes = disk.fs_type, disk.free_bytes
    advice = _advise(memory, best(results), size_bytes)
    if as_json:
        rows = [{**dataclasses.asdict(result), "median_bytes_per_s": result.median_bytes_per_s} for result in results]
        memory_json = dataclasses.asdict(memory)
        print_json(
            {"fs_type": fs_type, "free_bytes": free_bytes, "memory": memory_json, "disk": rows, "advice": advice}
        )
    else:
        _print(memory, results, advice, fs_type)


def _newest_bytes(folder: str) -> int | None:
    from ..reading.catalog import Catalog

    manifests = [entry.manifest for entry in Catalog(folder).entries() if entry.manifest is not None]
    return sum(file.size_bytes for file in manifests[-1].files) if manifests else None


def _advise(memory: MemoryResult, disk: DiskResult, size_bytes: int | None) -> dict[str, Any]:
    rate = disk.median_bytes_per_s
    advice: dict[str, Any] = {
        "num_writers": disk.num_writers,
        "io_mode": "direct" if disk.direct else "buffered",
        "checkpoint_bytes": size_bytes,
    }
    affordable = memory.available_bytes // 2
    if size_bytes is None:
        # Without a size: what the disk takes in ten seconds hides every stall up to that.
        advice["staging_bytes"] = _round_up(min(affordable, int(10 * rate)))
        advice["why"] = (
            "the size of your checkpoints is not known (--checkpoint-gib): this is what the disk takes in 10 s"
        )
        return advice
    fits = size_bytes * 1.02 <= affordable
    advice["staging_bytes"] = _round_up(int(size_bytes * 1.02)) if fits else _round_up(affordable)
    advice["durable_s"] = size_bytes / rate
    advice["stall_s"] = 0.0 if fits else (size_bytes - advice["staging_bytes"]) / rate
    if fits:
        advice["why"] = "one whole checkpoint fits: with a guarded optimizer, save returns at once"
    else:
        waits = format_seconds(advice["stall_s"])
        advice["why"] = (
            f"a checkpoint does not fit into half of the free memory: each save waits about {waits} for the disk"
        )
    return advice


def _round_up(num_bytes: int) -> int:
    step = 64 << 20
    return max(step, -(-num_bytes // step) * step)


def _print(memory: MemoryResult, results: list[DiskResult], advice: dict[str, Any], fs_type: str) -> None:
    typer.echo("")
    rows = [
        ("copy into warm staging memory", format_rate(memory.copy_warm_bytes_per_s)),
        ("copy into fresh memory (what a clone costs)", format_rate(memory.copy_fresh_bytes_per_s)),
        ("CRC-32, one core", format_rate(memory.crc_bytes_per_s)),
        ("memory available", format_bytes(memory.available_bytes)),
        ("file system", fs_type or "unknown"),
    ]
    for result in results:
        # A file system that refuses O_DIRECT is written through the page cache instead.
        note = "" if result.direct == (result.io_mode == "direct") else " (O_DIRECT was refused)"
        spread = f"{format_rate(min(result.rates_bytes_per_s))} to {format_rate(max(result.rates_bytes_per_s))}"
        rows.append(
            (
                f"write + fsync, {result.io_mode}, {result.num_writers} writers{note}",
                f"{format_rate(result.median_bytes_per_s)}  ({spread})",
            )
        )
    print_table(("measured", "value"), rows)
    typer.echo(
        f"\nadvice: staging_bytes={advice['staging_bytes']}  # {format_bytes(advice['staging_bytes'])}; {advice['why']}"
    )
    typer.echo(f"        num_writers={advice['num_writers']}, io_mode={advice['io_mode']!r}")
    if advice.get("durable_s") is not None:
        size = format_bytes(advice["checkpoint_bytes"])
        typer.echo(
            f"        a checkpoint of {size} is durable after about {format_seconds(advice['durable_s'])}: do "
            "not save more often than that"
        )
