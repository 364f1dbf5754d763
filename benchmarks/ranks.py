"""Processes of one job, joined by gloo, for what several ranks do together."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(work: Callable[..., None], options: argparse.Namespace, num_results: int) -> list[Any]:
    """Call ``work(rank, options, results)`` in each of `options.ranks` processes; what they have put into `results`, of
    which each is to put `num_results`. The processes meet in `options.directory`, which is made.
    """
    options.directory.mkdir(parents=True, exist_ok=True)
    (options.directory / "rendezvous").unlink(missing_ok=True)
    results = mp.get_context("spawn").SimpleQueue()
    processes = mp.spawn(_be_rank, (work, options, results), options.ranks, join=False)
    found: list[Any] = []
    while not processes.join(timeout=0.1):
        while not results.empty():
            found.append(results.get())
    while not results.empty():
        found.append(results.get())
    return found


def _be_rank(rank: int, work: Callable[..., None], options: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    address = f"file://{options.directory.absolute()}/rendezvous"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=options.ranks)
    work(rank, options, results)
    dist.destroy_process_group()
