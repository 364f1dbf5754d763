"""Cost of planning alone: the first time, and again for the same structure with changed values."""

from __future__ import annotations

import importlib
import time

from benchmarks.contenders.base import Unavailable
from benchmarks.request import Request
from benchmarks.scenarios.common import Result, build_workload

NAME = "async_ckpt_planner"


def run(request: Request, result: Result) -> None:
    """Calls the planner directly; no copy, no disk. `repeat_us_per_tensor` includes the check that the cached plan
    still holds.
    """
    if request.contender != NAME:
        raise Unavailable(f"{request.contender!r} does not plan apart from saving; known here: {NAME}")
    workload = build_workload(request, result)
    result["config"] = "Planner().plan(state): first, then repeated with fresh containers and changed values"
    try:
        planner = importlib.import_module("async_ckpt.plan.planner").Planner()
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"no planner: {error}") from error
    num_tensors = len(workload.tensors)
    samples = result.setdefault("samples", [])
    for index in range(1 + request.num_warmups + request.num_saves):
        workload.advance()
        state = workload.state()
        start = time.perf_counter()
        planner.plan(state, name="state.pt")
        took = time.perf_counter() - start
        if index == 0:
            result["first"] = {"plan_s": took, "us_per_tensor": took / num_tensors * 1e6}
        elif index > request.num_warmups:
            samples.append({"plan_s": took, "us_per_tensor": took / num_tensors * 1e6})
