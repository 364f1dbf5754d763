"""State that all ranks hold, on one disk: written by all of them (`replicated=True`), beside rank 0 alone.

    python -m benchmarks.replicated DIRECTORY [--size-mib 1024] [--ranks 4] [--repeats 3] [--saves 3] [--out FOLDER]

Each way has processes of its own, in alternating order, with as much staging memory as its ranks need. The first save
is not counted. Times are from a barrier to the end of the commit; memory is the peak over the state and the libraries.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import async_ckpt
from benchmarks.environment import describe
from benchmarks.limits import MIB
from benchmarks.results import append

WAYS = ("rank 0 alone", "replicated")
NUM_TENSORS = 300


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


def cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def work(rank: int, options: argparse.Namespace, way: str, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"file://{options.directory.absolute()}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=options.ranks)
    coordinator = async_ckpt.RankCoordinator.from_env(run_id="benchmark")
    numel = options.size_mib * MIB // 4 // NUM_TENSORS
    state = {f"layer.{i}": torch.full((numel,), 1.0 + i) for i in range(NUM_TENSORS)}
    writes = way == "replicated" or rank == 0
    share_bytes = options.size_mib * MIB // (options.ranks if way == "replicated" else 1)
    staging_bytes = share_bytes + 48 * MIB if writes else 48 * MIB
    root = options.directory / "root"
    before_bytes = peak_bytes()
    with async_ckpt.AsyncCheckpointEngine(root, staging_bytes=staging_bytes, coordinator=coordinator) as engine:
        engine.prewarm(staging_bytes)
        for number in range(1 + options.saves):
            for tensor in state.values():
                tensor.add_(1.0)
            dist.barrier()
            started_cpu_s, started_s = cpu_s(), time.perf_counter()
            engine.create(f"{number}")
            if writes:
                engine.save(state, "m.pt", replicated=way == "replicated")
            stall_s = time.perf_counter() - started_s
            engine.commit(f"{number}").result()
            durable_s = time.perf_counter() - started_s
            used_s = cpu_s() - started_cpu_s
            dist.barrier()
            if rank == 0:
                engine.delete(f"{number}")
            if number:
                results.put((rank, durable_s, stall_s, used_s, peak_bytes() - before_bytes))
    dist.destroy_process_group()


def measure(options: argparse.Namespace, way: str) -> list[tuple[int, float, float, float, int]]:
    (options.directory / "rendezvous").unlink(missing_ok=True)
    results = mp.get_context("spawn").SimpleQueue()
    processes = mp.spawn(work, (options, way, results), options.ranks, join=False)
    found = [results.get() for _ in range(options.saves * options.ranks)]
    processes.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--saves", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of results")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[tuple[int, float, float, float, int]]] = {way: [] for way in WAYS}
    for repeat in range(options.repeats):
        for way in WAYS if repeat % 2 == 0 else WAYS[::-1]:
            found[way] += measure(options, way)
    figures: dict[str, Any] = {}
    for way, samples in found.items():
        durable = [durable_s for rank, durable_s, *_ in samples if rank == 0]
        of_rank = {rank: [sample for sample in samples if sample[0] == rank] for rank in range(options.ranks)}
        used = [statistics.median(sample[3] for sample in of_rank[rank]) for rank in of_rank]
        peaks = [max(sample[4] for sample in of_rank[rank]) for rank in of_rank]
        stalls = [statistics.median(sample[2] for sample in of_rank[rank]) for rank in of_rank]
        print(
            f"{way:13} durable {statistics.median(durable):5.2f} s [{min(durable):.2f} to {max(durable):.2f}]  "
            f"stall, s, by rank {' '.join(f'{stall_s:.3f}' for stall_s in stalls)}  "
            f"CPU, s {' '.join(f'{used_s:.2f}' for used_s in used)}  "
            f"peak, MiB {' '.join(f'{peak / MIB:.0f}' for peak in peaks)}"
        )
        figures[way] = {"durable_s": durable, "stall_s": stalls, "cpu_s": used, "peak_bytes": peaks}
    if options.out is not None:
        shape = {"size_mib": options.size_mib, "ranks": options.ranks}
        append(
            {"probe": "replicated", "environment": describe(options.directory), **shape, "ways": figures}, options.out
        )


if __name__ == "__main__":
    main()
