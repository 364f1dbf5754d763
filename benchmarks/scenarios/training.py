"""What checkpoints cost a real training run on all cores: pairs of segments with and without them, in alternating
order.

During a segment only the contender's own syncing happens; after it, the segment's checkpoints are waited for and synced
(`drain_s`).
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from benchmarks.contenders.base import Contender, sync_tree
from benchmarks.scenarios.common import Request, Result, build_workload, check_complete, started
from benchmarks.workloads import Workload


def run(request: Request, result: Result) -> None:
    """Segments of `num_steps` steps; the warm-up runs a few steps and one save."""
    workload = build_workload(request, result)
    generator = torch.Generator().manual_seed(request.seed)
    segments: list[dict[str, Any]] = result.setdefault("segments", [])
    with started(request, result, workload) as contender:
        warm_up(request, contender, workload, generator)
        step = 1
        for pair in range(request.num_segments):
            order = (False, True) if (pair + request.repeat) % 2 == 0 else (True, False)
            for with_checkpoints in order:
                os.sync()
                segment, step = run_segment(request, contender, workload, generator, step, with_checkpoints)
                segments.append(segment)


def warm_up(request: Request, contender: Contender, workload: Workload, generator: torch.Generator) -> None:
    """Allocate gradients, warm the caches, make the first save."""
    for _ in range(5):
        train_one(workload, generator, request.num_tokens, None)
    contender.save(0, workload.state())
    contender.wait_safe()
    contender.wait_durable()
    contender.discard(0)


def train_one(workload: Workload, generator: torch.Generator, num_tokens: int, contender: Contender | None) -> None:
    """One step; a contender with a snapshot under way is asked before the parameters change."""
    workload.optimizer.zero_grad(set_to_none=True)
    workload.train_step(generator, num_tokens)
    if contender is not None:
        contender.before_step()
    workload.optimizer.step()


def run_segment(
    request: Request,
    contender: Contender,
    workload: Workload,
    generator: torch.Generator,
    step: int,
    with_checkpoints: bool,
) -> tuple[dict[str, Any], int]:
    """`num_steps` steps; a step's time includes the save that follows it."""
    steps: list[float] = []
    stalls: list[float] = []
    saved: list[int] = []
    start = time.perf_counter()
    for index in range(request.num_steps):
        begin = time.perf_counter()
        train_one(workload, generator, request.num_tokens, contender if saved else None)
        # The first checkpoint falls into the middle, so that each has steps after it to overlap with.
        if with_checkpoints and index % request.every == request.every // 2:
            called = time.perf_counter()
            contender.save(step, workload.state())
            stalls.append(time.perf_counter() - called)
            saved.append(step)
            step += 1
        steps.append(time.perf_counter() - begin)
    ended = time.perf_counter()
    if saved:
        contender.wait_safe()
        contender.wait_durable()
        for number in saved:
            if contender.syncs != "all":
                sync_tree(contender.produced(number))
    drained = time.perf_counter()
    for number in saved:
        check_complete(contender, workload, number)
        contender.discard(number)
    segment = {
        "with_checkpoints": with_checkpoints,
        "wall_s": ended - start,
        "drain_s": drained - ended,
        "num_checkpoints": len(saved),
        "step_s": steps,
        "stall_s": stalls,
        "detail": contender.detail() if saved else {},
    }
    return segment, step
