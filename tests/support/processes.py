"""Real processes: ranks forked from a server that has imported torch once, and scripts that are run or talked to."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import select
import socket
import subprocess
import sys
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


ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60.0


def run_python(*arguments: object, timeout_s: float = 300.0, **how: Any) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, from the repository's root to its end, and what it has said."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT, check=False, **how)


class Talking(subprocess.Popen[str]):
    """A script with these arguments that is told lines and says some; it has ended after the block."""

    def __init__(self, code: str, *arguments: object) -> None:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        super().__init__(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self._heard = ""

    def say(self, line: str) -> None:
        assert self.stdin is not None
        self.stdin.write(f"{line}\n")
        self.stdin.flush()

    def hear(self) -> str:
        """The next line."""
        while "\n" not in self._heard:
            said = self._listen()
            assert said, "it has ended"
            self._heard += said
        line, _, self._heard = self._heard.partition("\n")
        return line.strip()

    def hear_out(self) -> list[str]:
        """All other lines, to its end."""
        while said := self._listen():
            self._heard += said
        self.wait(TIMEOUT_S)
        return self._heard.splitlines()

    def _listen(self) -> str:
        assert self.stdout is not None
        assert select.select([self.stdout], [], [], TIMEOUT_S)[0], "it says nothing"
        return os.read(self.stdout.fileno(), 4096).decode()


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
    """What `work(rank, *args)` returned on each rank, in a gloo process group. Fails if a rank raised or hung."""
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
