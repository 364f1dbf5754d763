"""What an eager save adds to the copy itself: in turn, in one process, on the same memory; several processes.

    python -m benchmarks.eager_probe DIRECTORY [--workload adamw] [--size-mib 1024] [--repeats 7] [--processes 5] [--out
    FOLDER]

How fast a process copies depends on which pages it got (here by a factor of two from one process to the next), so a
copy in another process says little: the ratio is taken in each, and the median of the processes' ratios is what counts.
Three things are timed: one contiguous copy of as many bytes into warm memory with torch's threads; the state's own
tensors into warm ones, by torch in one call; and `create` + `save` + `commit`.
"""

from __future__ import annotations

import os
import statistics
from functools import partial
from pathlib import Path

import torch

from benchmarks.contenders.async_ckpt_engine import AsyncCkptEager
from benchmarks.results import in_own_process, keep, parser_of, reduced, timed
from benchmarks.workloads import build, flatten

WAYS = ("one copy", "tensor by tensor", "save")


def measure(directory: Path, workload_name: str, size_mib: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, in this process; the first round is not counted."""
    workload = build(workload_name, size_mib, seed=0, device="cpu")
    source, target = (torch.ones(workload.num_bytes, dtype=torch.uint8) for _ in range(2))
    warm = [torch.ones_like(tensor) for tensor in flatten(workload.state())[0].values()]
    contender = AsyncCkptEager()
    contender.setup(directory, workload)
    contender.prewarm()
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for k in range(repeats + 1):
        workload.advance()
        state = workload.state()
        live = [*flatten(state)[0].values()]
        os.sync()
        with torch.no_grad():
            taken["one copy"].append(timed(partial(target.copy_, source)))
            taken["tensor by tensor"].append(timed(partial(torch._foreach_copy_, warm, live)))
        taken["save"].append(timed(partial(contender.save, k, state)))
        contender.wait_durable()
        contender.discard(k)
    contender.close()
    return {way: seconds[1:] for way, seconds in taken.items()}


def main() -> None:
    options = parser_of(__doc__, workload="adamw", size_mib=1024, repeats=7, processes=5).parse_args()
    runs: list[dict[str, list[float]]] = []
    for k in range(options.processes):
        folder = options.directory / f"process-{k}"
        runs.append(in_own_process(measure, folder, options.workload, options.size_mib, options.repeats))
        medians = {way: statistics.median(seconds) for way, seconds in runs[-1].items()}
        print("  ".join(f"{way} {seconds * 1e3:.1f} ms" for way, seconds in medians.items()), flush=True)
    for way in WAYS[:-1]:
        ratios = reduced([statistics.median(run["save"]) / statistics.median(run[way]) for run in runs])
        print(f"save over {way}: {ratios.text(digits=2)}")
    keep(options, "eager", {"workload": options.workload, "size_mib": options.size_mib, "seconds": runs})


if __name__ == "__main__":
    main()
