"""The longest time a second thread could not run while the contender worked behind `save`."""

from __future__ import annotations

import os
import time

from benchmarks.contenders.base import sync_tree
from benchmarks.scenarios.common import Request, Result, build_workload, started
from benchmarks.ticker import Ticker


def run(request: Request, result: Result) -> None:
    """Two windows per save: during the call, and from its return until the contender is done.

    `idle_s` is the same ticker with nothing to do; `control_s` a ticker in another process during the background
    window.
    """
    workload = build_workload(request, result)
    samples = result.setdefault("samples", [])
    windows: list[tuple[float, float, float]] = []
    with started(request, result, workload) as contender:
        with Ticker() as ticker:
            idle_from = time.monotonic()
            time.sleep(0.5)
            idle_to = time.monotonic()
            for step in range(1 + request.num_warmups + request.num_saves):
                workload.advance()
                state = workload.state()
                os.sync()
                called = time.monotonic()
                contender.save(step, state)
                returned = time.monotonic()
                contender.wait_safe()
                contender.wait_durable()
                windows.append((called, returned, time.monotonic()))
                if contender.syncs != "all":
                    sync_tree(contender.produced(step))
                contender.discard(step)
        result["idle_s"] = ticker.longest(idle_from, idle_to)
        for called, returned, done in windows[1 + request.num_warmups :]:
            late = {"during_save_s": ticker.longest(called, returned), "background_s": ticker.longest(returned, done)}
            late["control_s"] = ticker.control_longest(returned, done)
            times = {"stall_s": returned - called, "window_s": done - returned}
            samples.append({**late, **times, "num_bytes": workload.num_bytes})
