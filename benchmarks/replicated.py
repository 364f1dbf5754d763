"""State that all ranks hold, on one disk: written by all of them (`replicated=True`), beside rank 0 alone.

    python -m benchmarks.replicated DIRECTORY [--size-mib 1024] [--ranks 4] [--saves 8] [--out FOLDER]

The same processes save in both ways in turn, through an engine for each with as much staging memory as its ranks need;
the first pair is not counted. Times are from a barrier to the end of the commit; memory is what an engine and its first
save have added to a process.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

import async_ckpt
from benchmarks.environment import resident_bytes
from benchmarks.limits import MIB
from benchmarks.results import keep, parser_of, reduced
from tests.support.processes import run_ranks

WAYS = ("rank 0 alone", "replicated")
NUM_TENSORS = 300


def open_engine(options: argparse.Namespace, way: str, rank: int) -> async_ckpt.AsyncCheckpointEngine:
    coordinator = async_ckpt.RankCoordinator.from_env(run_id=way)
    share_bytes = options.size_mib * MIB // (options.ranks if way == "replicated" else 1)
    staging_bytes = 48 * MIB + (share_bytes if way == "replicated" or rank == 0 else 0)
    root = options.directory / way.replace(" ", "-")
    engine = async_ckpt.AsyncCheckpointEngine(root, staging_bytes=staging_bytes, coordinator=coordinator)
    engine.prewarm(staging_bytes)
    return engine


def one_save(engine: Any, way: str, rank: int, tag: str, state: dict[str, torch.Tensor]) -> dict[str, float]:
    dist.barrier()
    started_cpu_s, started_s = time.process_time(), time.perf_counter()
    engine.create(tag)
    if way == "replicated" or rank == 0:
        engine.save(state, "m.pt", replicated=way == "replicated")
    stall_s = time.perf_counter() - started_s
    engine.commit(tag).result()
    durable_s = time.perf_counter() - started_s
    used_s = time.process_time() - started_cpu_s
    dist.barrier()
    if rank == 0:
        engine.delete(tag)
    return {"durable_s": durable_s, "stall_s": stall_s, "cpu_s": used_s}


def work(rank: int, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """What this rank has seen of each way: the memory that it took, then every save."""
    numel = options.size_mib * MIB // 4 // NUM_TENSORS
    state = {f"layer.{i}": torch.full((numel,), 1.0 + i) for i in range(NUM_TENSORS)}
    engines: dict[str, async_ckpt.AsyncCheckpointEngine] = {}
    found: dict[str, list[dict[str, float]]] = {}
    with contextlib.ExitStack() as stack:
        for way in WAYS:
            before_bytes = resident_bytes()
            engines[way] = stack.enter_context(open_engine(options, way, rank))
            one_save(engines[way], way, rank, "first", state)
            found[way] = [{"memory_bytes": resident_bytes() - before_bytes}]
        for number in range(options.saves):
            for way in WAYS if number % 2 else WAYS[::-1]:
                for tensor in state.values():
                    tensor.add_(1.0)
                found[way].append(one_save(engines[way], way, rank, f"{number}", state))
    return found


def main() -> None:
    options = parser_of(__doc__, size_mib=1024, ranks=4, saves=8).parse_args()
    found = run_ranks(options.directory / "ranks", options.ranks, work, options, timeout_s=3600.0)
    figures: dict[str, Any] = {}
    for way in WAYS:
        saves = [rank[way][1:] for rank in found]
        durable = [told["durable_s"] for told in saves[0]]
        used, stalls = (
            [statistics.median(told[name] for told in rank) for rank in saves] for name in ("cpu_s", "stall_s")
        )
        memory = [rank[way][0]["memory_bytes"] for rank in found]
        print(
            f"{way:13} durable {reduced(durable).text(digits=2)} s; "
            f"by rank: stall {' '.join(f'{1000 * stall_s:.0f}' for stall_s in stalls)} ms, "
            f"CPU {' '.join(f'{1000 * used_s:.0f}' for used_s in used)} ms, "
            f"memory {' '.join(f'{num_bytes / MIB:.0f}' for num_bytes in memory)} MiB"
        )
        figures[way] = {"durable_s": durable, "stall_s": stalls, "cpu_s": used, "memory_bytes": memory}
    pairs = zip(*(figures[way]["durable_s"] for way in WAYS), strict=True)
    print(f"replicated / rank 0 alone, of pairs: {statistics.median(other / alone for alone, other in pairs):.2f}")
    keep(options, "replicated", {**figures, "size_mib": options.size_mib, "ranks": options.ranks})


if __name__ == "__main__":
    main()
