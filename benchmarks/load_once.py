"""One file into the tensors of several processes: one reads and sends it; beside one process alone, and each by itself.

    python -m benchmarks.load_once DIRECTORY [--size-mib 2048] [--ranks 4] [--repeats 3] [--out FOLDER]

The processes and their tensors are there before; every time is from a barrier to the last of them. What the disk gave
is counted by /proc/self/io of all of them. `load_once` sets no old bytes aside: its like is the one that is not atomic.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import async_ckpt
from benchmarks.limits import MIB, evict
from benchmarks.results import keep, parser_of, reduced
from benchmarks.workloads import commit
from tests.support.processes import run_ranks

WAYS = ("one process", "one, not atomic", "load_once", "each by itself")


def read_from_disk() -> int:
    return int(Path("/proc/self/io").read_text().partition("\nread_bytes:")[2].split()[0])


def load(way: str, rank: int, coordinator: async_ckpt.RankCoordinator, path: Path, target: Any) -> tuple[float, int]:
    """Seconds, and bytes from the disk, on this rank."""
    if rank == 0:
        evict(path)
    dist.barrier()
    before, started = read_from_disk(), time.perf_counter()
    if way == "load_once":
        coordinator.load_once(path, target)
    elif way == "each by itself" or rank == 0:
        async_ckpt.load_into(target, path, atomic=False if way == "one, not atomic" else "auto")
    dist.barrier()
    return time.perf_counter() - started, read_from_disk() - before


def work(rank: int, options: argparse.Namespace) -> list[dict[str, tuple[float, int]]]:
    coordinator = async_ckpt.RankCoordinator.from_env(run_id="benchmark")
    path = options.directory / "root/probe/m.pt"
    num = options.size_mib * MIB // 4 // 300
    target = {f"layer.{i}": torch.ones(num) for i in range(300)}
    with async_ckpt.AsyncCheckpointEngine(path.parent.parent, staging_bytes=64 * MIB, coordinator=coordinator):
        return [{way: load(way, rank, coordinator, path, target) for way in WAYS} for _ in range(options.repeats)]


def main() -> None:
    options = parser_of(__doc__, size_mib=2048, ranks=4, repeats=3).parse_args()
    num = options.size_mib * MIB // 4 // 300
    with async_ckpt.AsyncCheckpointEngine(options.directory / "root", overwrite="replace") as engine:
        commit(engine, "probe", {f"layer.{i}": torch.randn(num) for i in range(300)})
    found = run_ranks(options.directory / "ranks", options.ranks, work, options, timeout_s=3600.0)
    taken = {way: [one[way][0] for one in found[0]] for way in WAYS}
    disk = {way: sum(one[way][1] for rank in found for one in rank) // options.repeats for way in WAYS}
    alone_s = statistics.median(taken[WAYS[0]])
    for way in WAYS:
        figure, read = reduced(taken[way]), disk[way] / MIB
        share = f"{figure.median / alone_s:4.2f} of one process"
        print(f"{way:15} {figure.text(digits=2)} s  {share}  {read:7.0f} MiB from the disk")
    figures = {"size_mib": options.size_mib, "ranks": options.ranks, "seconds": taken, "disk_bytes": disk}
    keep(options, "load_once", figures)


if __name__ == "__main__":
    main()
