"""Ranks as real processes, forked from a server that has imported torch once."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "async_ckpt.engine.engine",
        "async_ckpt.ranks.rank_coordinator",
        "async_ckpt.reading.catalog",
        "async_ckpt.integrations.dcp",
    ]
)


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _rank_main(
    folder: str, rank: int, world_size: int, port: int, work: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    try:
        outcome: tuple[bool, Any] = (True, work(rank, *args))
    except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
        outcome = (False, traceback.format_exc())
    Path(folder, f"outcome{rank}").write_bytes(pickle.dumps(outcome))
    if outcome[0]:
        dist.destroy_process_group()


def run_ranks(
    folder: Path, world_size: int, work: Callable[..., Any], *args: Any, timeout_s: float = 90.0
) -> list[Any]:
    """What `work(rank, *args)` returned on each rank, with a gloo process group around it. Fails if a rank raised or
    hung.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = [
        context.Process(target=_rank_main, args=(str(folder), rank, world_size, port, work, args))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.exitcode is None:
            process.kill()
            process.join()
    results = []
    for rank in range(world_size):
        path = folder / f"outcome{rank}"
        assert path.exists(), f"rank {rank} of {world_size} hung or died"
        ok, value = pickle.loads(path.read_bytes())
        path.unlink()
        assert ok, f"rank {rank}: {value}"
        results.append(value)
    return results
