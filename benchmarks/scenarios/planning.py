"""Cost of planning alone: the first time, and again for the same structure with changed values."""

from __future__ import annotations

from functools import partial

from async_ckpt.plan.planner import Planner
from benchmarks.contenders.base import Unavailable
from benchmarks.results import timed
from benchmarks.scenarios.common import Request, Result, build_workload

NAME = "async_ckpt_planner"


def run(request: Request, result: Result) -> None:
    """The planner alone; `repeat_us_per_tensor` includes the check that the cached plan still holds."""
    if request.contender != NAME:
        raise Unavailable(f"{request.contender!r} does not plan apart from saving; known here: {NAME}")
    workload = build_workload(request, result)
    result["config"] = "Planner().plan(state): first, then repeated with fresh containers and changed values"
    planner = Planner()
    num_tensors = len(workload.tensors)
    samples = result.setdefault("samples", [])
    for index in range(1 + request.num_warmups + request.num_saves):
        workload.advance()
        state = workload.state()
        took_s = timed(partial(planner.plan, state, name="state.pt"))
        sample = {"plan_s": took_s, "us_per_tensor": took_s / num_tensors * 1e6}
        if index == 0:
            result["first"] = sample
        elif index > request.num_warmups:
            samples.append(sample)
