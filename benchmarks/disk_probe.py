"""The writer pool side by side with fio on one disk: seconds until synced, in turn.

    python -m benchmarks.disk_probe DIRECTORY [--sizes-mib 256 1024 4096] [--repeats 5] [--modes direct:16 buffered:4]
    [--out FOLDER]

The pool's figure runs from opening to synced (reserving space and CRC included), as `async-ckpt bench` measures it;
fio's is its own runtime, which leaves out opening and reserving. The best fio mode is the limit.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from async_ckpt.cli.bench import DiskMeasurement
from benchmarks.limits import MIB, fio_buffered_fsync, fio_direct_depth_4, fio_direct_depth_16
from benchmarks.results import keep, parser_of

FIO = {"fio direct 4": fio_direct_depth_4, "fio direct 16": fio_direct_depth_16, "fio buffered": fio_buffered_fsync}


def probe(directory: Path, size_bytes: int, repeats: int, modes: list[str]) -> dict[str, list[float]]:
    """Seconds of each way, all in turn, `repeats` times after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in (*modes, *FIO)}
    with DiskMeasurement(str(directory)) as disk:
        for k in range(repeats + 1):
            for name in seconds if k % 2 else reversed(list(seconds)):
                if name in FIO:
                    taken_s = float(FIO[name](directory, size_bytes)["durable_s"])
                else:
                    io_mode, _, num_writers = name.partition(":")
                    rate = disk.measure("direct" if io_mode == "direct" else "buffered", int(num_writers), size_bytes)
                    taken_s = size_bytes / rate.median_bytes_per_s
                if k:
                    seconds[name].append(taken_s)
    return seconds


def table(size_bytes: int, seconds: dict[str, list[float]]) -> str:
    """One size as text, each way with its share of the best fio mode's rate."""
    best_s = min(statistics.median(seconds[name]) for name in FIO)
    lines = [f"{size_bytes / 2**30:g} GiB"]
    for name, values in seconds.items():
        middle = statistics.median(values)
        lines.append(
            f"  {name:14} {middle:7.3f} s [{min(values):.3f} to {max(values):.3f}]  share {best_s / middle:.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and keep the figures if asked to."""
    parser = parser_of(__doc__, repeats=5)
    parser.add_argument("--sizes-mib", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument(
        "--modes", nargs="+", default=["direct:16", "buffered:4"], help="direct:WRITERS or buffered:WRITERS"
    )
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for size_mib in options.sizes_mib:
        found[str(size_mib)] = probe(options.directory, size_mib * MIB, options.repeats, options.modes)
        print(table(size_mib * MIB, found[str(size_mib)]), flush=True)
    keep(options, "disk", {"seconds": found})


if __name__ == "__main__":
    main()
