"""Extra peak memory: the child marks its baseline, the parent samples the whole process tree (see `run.py`)."""

from __future__ import annotations

import time
from pathlib import Path

from benchmarks import contenders
from benchmarks.environment import memory_bytes, resident_bytes
from benchmarks.scenarios.common import Request, Result, build_workload, started, timed_save


def run(request: Request, result: Result) -> None:
    """Baseline: interpreter, libraries and the live state, before the contender starts.

    `hwm_extra_bytes` is exact, for this process alone; the parent adds `tree_extra_bytes` (with helper processes).
    """
    workload = build_workload(request, result)
    contenders.load(request.contender)
    # "5" resets the peak (VmHWM) to what is resident now.
    Path("/proc/self/clear_refs").write_text("5")
    baseline = resident_bytes()
    time.sleep(0.3)
    result["baseline_monotonic_s"] = time.monotonic()
    samples = result.setdefault("samples", [])
    with started(request, result, workload) as contender:
        for step in range(request.num_warmups + request.num_saves):
            sample = timed_save(contender, workload, step)
            contender.discard(step)
            sample["hwm_extra_bytes"] = memory_bytes("VmHWM:", "self/status") - baseline
            samples.append(sample)
        result["hwm_extra_bytes"] = memory_bytes("VmHWM:", "self/status") - baseline
        result["end_monotonic_s"] = time.monotonic()
