"""Stall, safe to mutate, until durable: the first save, warm-ups, then the measured ones. Limits run here too."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.limits import LIMITS
from benchmarks.scenarios.common import Request, Result, build_workload, started, timed_save
from benchmarks.workloads import build


def run(request: Request, result: Result) -> None:
    """One contender (or limit) in this process."""
    if request.contender in LIMITS:
        run_limit(request, result)
        return
    workload = build_workload(request, result)
    samples = result.setdefault("samples", [])
    with started(request, result, workload) as contender:
        for step in range(1 + request.num_warmups + request.num_saves):
            sample = timed_save(contender, workload, step)
            contender.discard(step)
            if step == 0:
                result["first"] = sample
            elif step > request.num_warmups:
                samples.append(sample)


def run_limit(request: Request, result: Result) -> None:
    """The limit for as many bytes as the workload has (the workload itself is not kept in memory)."""
    described = build(
        request.workload, request.size_mib, seed=request.seed, device="meta" if request.workload == "huge" else "cpu"
    )
    result["workload"] = described.describe()
    num_bytes = described.num_bytes
    del described
    measure, result["config"] = LIMITS[request.contender]
    result.update(syncs="all", synced_by="fio" if "fio" in request.contender else "")
    directory = Path(request.directory)
    samples = result.setdefault("samples", [])
    for _ in range(request.num_saves):
        os.sync()
        samples.append(measure(directory, num_bytes))
