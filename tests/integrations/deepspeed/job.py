"""Starts the ranks of one job as processes and collects what they say."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[3]


def run_job(
    directory: Path, world_size: int, scenarios: list[str], *, timeout_s: float = 600.0
) -> dict[str, str | None]:
    """Run the scenarios, in order, on `world_size` ranks; per scenario the first failure, or None.

    A scenario that was not reached, or a process that ended badly, is a failure too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    processes = start(directory, world_size, ["-m", "tests.integrations.deepspeed.worker", str(directory), *scenarios])
    finish(processes, timeout_s)
    log = "\n".join(f"--- {p.name}\n{p.read_text(errors='replace')[-2000:]}" for p in sorted(directory.glob("log-*")))
    outcomes: dict[str, str | None] = {}
    for name in scenarios:
        outcomes[name] = None
        for rank, process in enumerate(processes):
            file = directory / f"outcomes-{rank}.json"
            said: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
            failure = said.get(name, f"not reached; the process ended with {process.returncode}:\n{log}")
            if failure is not None and outcomes[name] is None:
                outcomes[name] = f"rank {rank}: {failure}"
        if outcomes[name] is None and any(process.returncode for process in processes):
            outcomes[name] = f"exit codes {[process.returncode for process in processes]}:\n{log}"
    return outcomes


def start(directory: Path, world_size: int, arguments: list[str]) -> list[subprocess.Popen[bytes]]:
    """One process per rank, with the variables that a launcher sets."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "DS_ACCELERATOR": "cpu",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "CROSS_RANK": "0",
            "CROSS_SIZE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONWARNINGS": "ignore",
        }
        log = (directory / f"log-{rank}").open("wb")
        processes.append(
            subprocess.Popen(
                [sys.executable, *arguments], env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY
            )
        )
        log.close()
    return processes


def finish(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> None:
    """Wait for all of them, killing those that hang."""
    try:
        for process in processes:
            process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
