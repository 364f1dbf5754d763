"""Jobs of real processes: each rank follows a plan of plain data and writes what it has learnt to a file.

A plan is a list of (tag, act) per rank. Acts: "commit"; "raise" (after save), "die" (SIGKILL itself after save), "die
early" (before create), "hang" (never commits, goes on when told to), "stop" (SIGSTOP itself after save), "full" (its
disk is full), "skip" (no call at all for this tag), "late" (creates when told to), "leave" (closes its engine without a
call for this tag), "death before report" (SIGKILL once its part is durable), and for rank 0 "death in rename", "death
after rename". Of jobs with a replicated file: "death before share" (SIGKILL when it is opened), "lie" (this rank's is
another one).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.errors import CheckpointError, OutOfSpaceError
from async_ckpt.ranks.rank_coordinator import Node, RankCoordinator
from async_ckpt.storage.filesystem import FileSystem
from async_ckpt.storage.write_file import WritableFile
from tests.support.processes import context

Plan = Sequence[tuple[str, str]]
REPLICATED = "all.pt"


class FullDisk(FileSystem):
    """Real, until the path holds `poison`: then no space is left."""

    def __init__(self, poison: str) -> None:
        super().__init__()
        self._poison = poison

    async def open_write(self, path: str, size_bytes: int, *, direct: bool, executor: Executor) -> WritableFile:
        if self._poison in path:
            raise OutOfSpaceError("the disk is full", path=path, needed_bytes=size_bytes, free_bytes=0)
        return await super().open_write(path, size_bytes, direct=direct, executor=executor)


class Deadly(FileSystem):
    """Kills its process by SIGKILL at a step of the checkpoint whose staging name holds `tag`."""

    def __init__(self, tag: str, act: str) -> None:
        super().__init__()
        self._tag = f".{tag}."
        self._act = act

    def _meet(self, act: str, path: str) -> None:
        if act == self._act and self._tag in path:
            os.kill(os.getpid(), signal.SIGKILL)

    def fsync_dir(self, path: str) -> None:
        super().fsync_dir(path)
        # The first sync of the staging directory is that of this rank's part.
        if any(name.startswith(".part.") for name in os.listdir(path)):
            self._meet("death before report", path)

    async def open_write(self, path: str, size_bytes: int, **how: Any) -> WritableFile:
        if path.endswith(REPLICATED):
            self._meet("death before share", path)
        return await super().open_write(path, size_bytes, **how)

    def rename_noreplace(self, source: str, target: str) -> None:
        self._meet("death in rename", source)
        super().rename_noreplace(source, target)
        self._meet("death after rename", source)


@dataclass(frozen=True)
class Job:
    """What all ranks of a job share. `store` is "host:port" of a TCPStore, "zero" (rank 0 holds it) or the path of a
    FileStore.
    """

    root: str
    results: str
    world_size: int
    store: str
    timeout_s: float = 30.0
    run_id: str = "r"
    node_size: int = 0
    numel: int = 3000
    linger_s: float = 5.0
    replicated: bool = False
    """Whether all ranks also save one file that all of them hold."""
    extra: dict[str, Any] = field(default_factory=dict)

    def connect(self, rank: int) -> Any:
        if self.store.startswith("zero:"):
            port = int(self.store.removeprefix("zero:"))
            return dist.TCPStore(
                "127.0.0.1", port, is_master=rank == 0, wait_for_workers=False, timeout=timedelta(seconds=30)
            )
        if self.store.startswith("/"):
            return dist.FileStore(self.store, -1)
        host, _, port_text = self.store.rpartition(":")
        return dist.TCPStore(host, int(port_text), is_master=False, timeout=timedelta(seconds=30))

    def coordinator(self, rank: int) -> RankCoordinator:
        node = None
        if self.node_size:
            first = rank - rank % self.node_size
            node = Node(
                rank // self.node_size, self.world_size // self.node_size, tuple(range(first, first + self.node_size))
            )
        return RankCoordinator(
            self.connect(rank),
            rank,
            self.world_size,
            timeout_s=self.timeout_s,
            run_id=self.run_id,
            node=node,
            linger_s=self.linger_s,
            channel="c",
        )

    def engine(self, rank: int, poison: str, deadly: FileSystem | None = None) -> AsyncCheckpointEngine:
        root = f"{self.root}/node{rank // self.node_size}" if self.node_size else self.root
        filesystem = FullDisk(poison) if poison else (deadly or FileSystem())
        return AsyncCheckpointEngine(
            root,
            staging_bytes=1 << 20,
            chunk_bytes=4096,
            coordinator=self.coordinator(rank),
            filesystem=filesystem,
            **self.extra,
        )


def state_of(rank: int, tag: str, numel: int) -> dict[str, Any]:
    """What `rank` saves as `tag`: readers can tell whose it is, and of which tag."""
    return {"rank": rank, "tag": tag, "x": torch.arange(numel) * 7 + rank * 1000 + sum(tag.encode())}


def start_together(job: Job, num_ranks: int) -> dist.FileStore:
    """Wait for the others: timeouts of a few seconds are for checkpoints, and not for how far apart processes start."""
    gate = dist.FileStore(f"{job.results}/gate", -1)
    if gate.add("ready", 1) == num_ranks:
        gate.set("all ready", "yes")
    with contextlib.suppress(RuntimeError):
        # One of them may have been killed already.
        gate.wait(["all ready"], timedelta(seconds=20))
    return gate


def run_rank(job: Job, rank: int, plan: Plan) -> None:
    """One rank's process."""
    torch.set_num_threads(1)
    poison = next((f".{tag}." for tag, act in plan if act == "full"), "")
    with open(f"{job.results}/rank{rank}.jsonl", "a", buffering=1) as out:
        deadly = next((Deadly(tag, act) for tag, act in plan if act.startswith("death")), None)
        with job.engine(rank, poison, deadly) as engine:
            gate = start_together(job, job.world_size)
            for tag, act in plan:
                if act == "skip":
                    continue
                if act == "leave":
                    break
                if act == "late":
                    gate.wait([tag], timedelta(seconds=60))
                if act == "die early":
                    os.kill(os.getpid(), signal.SIGKILL)
                started = time.monotonic()
                record: dict[str, Any] = {"tag": tag, "outcome": "ok"}
                try:
                    _one(job, engine, rank, tag, act)
                except CheckpointError as error:
                    record |= {
                        "outcome": type(error).__name__,
                        "message": str(error),
                        "blamed": getattr(error, "rank", None),
                    }
                    record["committed"] = getattr(error, "committed", None)
                except ZeroDivisionError:
                    record["outcome"] = "raised"
                out.write(json.dumps(record | {"s": time.monotonic() - started}) + "\n")
        out.write(json.dumps({"tag": "", "outcome": "closed"}) + "\n")


def _one(job: Job, engine: AsyncCheckpointEngine, rank: int, tag: str, act: str) -> None:
    engine.create(tag)
    try:
        engine.save(state_of(rank, tag, job.numel), f"rank{rank}.pt")
        if job.replicated:
            lie = int(act == "lie")
            engine.save(
                state_of(0, tag, job.numel) | {"x": state_of(lie, tag, job.numel)["x"]}, REPLICATED, replicated=True
            )
        if act == "raise":
            raise ZeroDivisionError("by hand")
        if act in ("die", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if act == "die" else signal.SIGSTOP)
        if act == "hang":
            # Until the others have given this tag up.
            dist.FileStore(f"{job.results}/gate", -1).wait([tag], timedelta(seconds=60))
        if act == "raise out":
            raise RuntimeError("out of the block")
    except ZeroDivisionError:
        engine.abort(tag)
        raise
    engine.commit(tag).result(60)


class Processes:
    """The ranks of one job, as processes."""

    def __init__(self, job: Job, plans: Sequence[Plan]) -> None:
        self.job = job
        Path(job.results).mkdir(parents=True, exist_ok=True)
        self.ranks = [
            context.Process(target=run_rank, args=(job, rank, plan), daemon=True) for rank, plan in enumerate(plans)
        ]
        for process in self.ranks:
            process.start()
        self._deadline_s = time.monotonic() + 60.0

    def have_ended(self) -> bool:
        """Whether it is time to `join`: all have ended, or will not."""
        return all(rank.exitcode is not None for rank in self.ranks) or time.monotonic() > self._deadline_s

    def join(self, timeout_s: float = 60.0) -> list[int | None]:
        """Exit codes; a rank that is still there after `timeout_s` is killed and shows as None."""
        deadline = time.monotonic() + timeout_s
        codes: list[int | None] = []
        for process in self.ranks:
            process.join(max(0.0, deadline - time.monotonic()))
            codes.append(process.exitcode)
            if process.exitcode is None:
                process.kill()
                process.join()
            process.close()
        return codes

    def learnt(self, rank: int) -> list[dict[str, Any]]:
        path = Path(self.job.results, f"rank{rank}.jsonl")
        return (
            [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
        )


def let_go(job: Job, tag: str) -> None:
    """Wake the ranks that hang at `tag`."""
    dist.FileStore(f"{job.results}/gate", -1).set(tag, "go")


Scenario = Generator[Callable[[], bool], None, Any]


def ran(job: Job, plans: Sequence[Plan], codes: list[int] | None = None) -> Scenario:
    """What each rank of a job has learnt, as a part of a scenario."""
    processes = Processes(job, plans)
    yield processes.have_ended
    assert processes.join(1.0) == (codes or [0] * job.world_size)
    return [processes.learnt(rank) for rank in range(job.world_size)]


def side_by_side(scenarios: Mapping[str, Scenario], num_at_once: int) -> dict[str, BaseException | None]:
    """How each has ended. A scenario yields the conditions that it waits for: those that wait take no time of others.

    All on this thread: children of several threads take each other's exit codes.
    """
    queued, ended = list(scenarios.items()), dict[str, BaseException | None]()
    running: dict[str, tuple[Scenario, Callable[[], bool]]] = {}
    while queued or running:
        while queued and len(running) < num_at_once:
            name, scenario = queued.pop(0)
            running[name] = scenario, lambda: True
        for name, (scenario, is_over) in list(running.items()):
            if is_over():
                try:
                    running[name] = scenario, next(scenario)
                except BaseException as end:  # noqa: BLE001 -- the test of its name raises it
                    ended[name] = None if isinstance(end, StopIteration) else end
                    del running[name]
        threading.Event().wait(0.02)
    return ended
