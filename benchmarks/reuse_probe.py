"""What a checkpoint costs of which little has changed: the same state saved by an engine that shares what did not
change (`reuse="auto"`) and by one that writes everything, in turn within one process.

    python -m benchmarks.reuse_probe DIRECTORY [--size-mib 1024] [--changed 0.01] [--repeats 5] [--cases part,all]
        [--out FOLDER]

DIRECTORY decides: its file system has reflinks (xfs, btrfs) or not. Four cases: a part of the bytes has changed (one
tensor after the other), none has, all have, all have and no version counter shows it (as after a fused optimizer).
Durable is from the call of `save` until the commit has succeeded; beside it what fio takes to write as much.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any, Literal

import torch

from async_ckpt import AsyncCheckpointEngine, KeepLast
from benchmarks.limits import MIB, fio_write
from benchmarks.results import keep, parser_of, reduced
from benchmarks.workloads import commit

CASES = ("part", "nothing", "all", "fused")
MODES: tuple[Literal["auto", "off"], ...] = ("auto", "off")


def measure(options: argparse.Namespace) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Per case and mode a sample for each repeat."""
    num_tensors = round(1 / options.changed)
    state = {f"w{k}": torch.randn(options.size_mib * MIB // 4 // num_tensors) for k in range(num_tensors)}
    root: Path = options.directory
    how: Any = {"staging_bytes": (options.size_mib + 64) * MIB, "retention": KeepLast(1)}
    engines = {mode: AsyncCheckpointEngine(root / mode, reuse=mode, **how) for mode in MODES}
    cases = options.cases.split(",")
    samples: dict[str, dict[str, list[dict[str, float]]]] = {case: {mode: [] for mode in MODES} for case in cases}
    for mode in MODES:
        engines[mode].prewarm()
        commit(engines[mode], "first", state).result()
    for k in range(options.repeats):
        for case in cases:
            changed = {"part": [state[f"w{k % num_tensors}"]], "nothing": []}.get(case, list(state.values()))
            for tensor in changed:
                (tensor.data if case == "fused" else tensor).add_(1)
            for mode in MODES if k % 2 else MODES[::-1]:
                pending = commit(engines[mode], f"{case}-{k}", state)
                pending.result()
                metrics = pending.metrics
                sample = {"durable_s": metrics.total_s, "stall_s": metrics.stall_s}
                samples[case][mode].append(sample | {"written_bytes": metrics.written_bytes})
    for engine in engines.values():
        engine.close()
    return samples


def main() -> None:
    options = parser_of(__doc__, size_mib=1024, changed=0.01, repeats=5, cases=",".join(CASES)).parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    num_bytes = options.size_mib * MIB
    limits = [fio_write(options.directory, num_bytes, "direct_qd16")["durable_s"] for _ in range(options.repeats)]
    samples = measure(options)
    for mode in MODES:
        shutil.rmtree(options.directory / mode)
    for case, by_mode in samples.items():
        medians = {
            mode: {key: statistics.median(sample[key] for sample in taken) for key in taken[0]}
            for mode, taken in by_mode.items()
        }
        shared, whole = medians["auto"], medians["off"]
        durable = reduced([sample["durable_s"] for sample in by_mode["auto"]])
        print(
            f"{case:8} durable {durable.text(digits=3)} s of "
            f"{whole['durable_s']:.3f} s: {shared['durable_s'] / whole['durable_s']:.3f}; written "
            f"{shared['written_bytes'] / MIB:.1f} of {whole['written_bytes'] / MIB:.1f} MiB; stall "
            f"{shared['stall_s'] * 1e3:.1f} of {whole['stall_s'] * 1e3:.1f} ms"
        )
    print(f"fio      durable {reduced(limits).text(digits=3)} s")
    keep(options, "reuse", {"size_mib": options.size_mib, "samples": samples, "fio_s": limits})


if __name__ == "__main__":
    main()
