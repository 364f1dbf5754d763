"""What scenarios share: what is asked of them, starting a contender, one timed save, a quiet disk between."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import contenders, workloads
from benchmarks.contenders.base import Contender, sync_tree, tree_bytes
from benchmarks.results import timed
from benchmarks.workloads import Workload

Result = dict[str, Any]
SCENARIOS = ("save", "training", "gil", "restore", "memory", "planning")


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that decides what a child process does."""

    scenario: str
    contender: str
    workload: str
    size_mib: int
    directory: str
    repeat: int = 0
    seed: int = 0
    device: str = "cpu"
    num_warmups: int = 1
    """Saves between the first one (reported on its own) and the measured ones."""
    num_saves: int = 3
    num_steps: int = 30
    """Training steps per segment."""
    every: int = 10
    """Steps between two checkpoints."""
    num_segments: int = 2
    """Pairs of segments, one with checkpoints and one without; their order alternates."""
    num_tokens: int = 64


class ShortCheckpoint(RuntimeError):
    """The contender reported success, but the bytes are not there."""


def build_workload(request: Request, result: Result) -> Workload:
    """The workload of the request, described in the result."""
    workload = workloads.build(request.workload, request.size_mib, seed=request.seed, device=request.device)
    result["workload"] = workload.describe()
    return workload


@contextmanager
def started(request: Request, result: Result, workload: Workload) -> Iterator[Contender]:
    """Import, construct, set up, prewarm, and close in the end; the start is timed apart from every save."""
    contender = contenders.load(request.contender)()
    result.update(config=contender.config, syncs=contender.syncs, synced_by=contender.synced_by)
    directory = Path(request.directory) / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    result["setup_s"] = timed(partial(contender.setup, directory, workload))
    result["prewarm_s"] = timed(contender.prewarm)
    try:
        yield contender
    finally:
        contender.close()


def timed_save(contender: Contender, workload: Workload, step: int) -> dict[str, Any]:
    """One save, followed to the disk. All times count from the call of `save`, in seconds.

    Raises ShortCheckpoint when fewer bytes landed than the state has.
    """
    workload.advance()
    if workload.device.type == "cuda":
        torch.cuda.synchronize()
    state = workload.state()
    # Earlier dirty pages reach the disk, so that one save does not pay for another's.
    os.sync()
    start = time.perf_counter()
    contender.save(step, state)
    stalled = time.perf_counter()
    contender.wait_safe()
    safe = time.perf_counter()
    contender.wait_durable()
    saved = time.perf_counter()
    if contender.syncs != "all":
        sync_tree(contender.produced(step))
    durable = time.perf_counter()
    check_complete(contender, workload, step)
    return {
        "step": step,
        "stall_s": stalled - start,
        "safe_s": safe - start,
        "saved_s": saved - start,
        "durable_s": durable - start,
        "num_bytes": workload.num_bytes,
        "disk_bytes": tree_bytes(contender.produced(step)),
        "detail": contender.detail(),
    }


def check_complete(contender: Contender, workload: Workload, step: int) -> None:
    """A save that was skipped or cut short must not become a fast row."""
    path = contender.produced(step)
    if not path.exists():
        raise ShortCheckpoint(f"step {step}: reported as saved, but {path.name} does not exist")
    found = tree_bytes(path)
    if found < workload.num_bytes:
        raise ShortCheckpoint(f"step {step}: reported as saved, but {found} of {workload.num_bytes} bytes are on disk")
