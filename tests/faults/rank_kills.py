"""Ranks killed at random points of many commits. ``python -m tests.faults.rank_kills --jobs 60``"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from async_ckpt import Catalog, load
from tests.ranks.jobs import REPLICATED, Job, Processes, state_of
from tests.support.processes import free_port

TAGS_PER_JOB = 8


@dataclass
class Tally:
    """What a series of jobs has shown."""

    jobs: int = 0
    committed: int = 0
    failed: int = 0
    unknown: int = 0
    others: int = 0
    """Failures that name another rank, one that was late on a busy machine, or none, where the store was lost."""
    slowest_s: float = 0.0
    """The longest that a rank waited to hear of a failure."""


def check(job: Job, learnt: Sequence[Sequence[dict[str, Any]]], killed: int, tally: Tally) -> None:
    """Committed means committed for all, and there; failed means not there; all that is there is whole."""
    catalog = Catalog(job.root)
    present = set(catalog.tags())
    outcomes: dict[str, set[str]] = {}
    for rank, records in enumerate(learnt):
        for record in records:
            if record["outcome"] == "closed":
                continue
            kind = "ok" if record["outcome"] == "ok" else ("unknown" if record["committed"] is None else "failed")
            outcomes.setdefault(record["tag"], set()).add(kind)
            assert record["s"] < 2 * job.timeout_s + 15, (rank, record)
            if kind == "failed":
                assert record["outcome"] == "RankFailedError", (rank, record)
                tally.slowest_s = max(tally.slowest_s, record["s"])
                others = ("the store does not answer", f"within {job.timeout_s:g} s")
                assert record["blamed"] == killed or any(other in record["message"] for other in others), (rank, record)
                tally.others += record["blamed"] != killed
    for tag, kinds in outcomes.items():
        assert not {"ok", "failed"} <= kinds, (tag, outcomes)
        assert ("ok" not in kinds) or tag in present, (tag, kinds)
        assert ("failed" not in kinds) or tag not in present, (tag, kinds)
        tally.committed += "ok" in kinds
        tally.failed += "failed" in kinds
        tally.unknown += kinds == {"unknown"}
    for tag in present:
        assert catalog.verify(tag).ok, tag
        for entry in catalog.manifest(tag).files:
            assert (entry.rank is None) == (entry.path == REPLICATED)
            assert load(catalog.path(tag) / entry.path)["x"].equal(state_of(entry.rank or 0, tag, job.numel)["x"])


def kill_one(folder: Path, world_size: int, seed: int, tally: Tally, kind: str = "tcp") -> None:
    """One job of which one rank is killed at a random moment, then another job, of another size, in the same root.

    `kind` of store: "tcp" (in another process), "file", "zero" (in rank 0's process).
    """
    chance = random.Random(seed)
    store: Any = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    address = f"127.0.0.1:{store.port}"
    root = str(folder / "root")
    used = {"tcp": address, "file": str(folder / "store"), "zero": f"zero:{free_port()}"}[kind]
    how: dict[str, Any] = {"timeout_s": 5.0, "numel": 40_000, "linger_s": 0.5, "replicated": True}
    job = Job(root, str(folder / "first"), world_size, used, run_id="1", **how)
    tags = [f"k{n}" for n in range(TAGS_PER_JOB)]
    killed = chance.randrange(world_size)
    # What follows a kill fails too: two are enough to see that the survivors stay well.
    after = chance.randrange(TAGS_PER_JOB - 1)
    if kind == "zero":
        # Before the store listens, there is no job.
        after = max(1, after)
    plans = [[(tag, "commit") for tag in tags[: after + 2]] for _ in range(world_size)]
    processes = Processes(job, plans)
    victim = processes.ranks[killed].pid
    while len(processes.learnt(killed)) < after and processes.ranks[killed].is_alive():
        threading.Event().wait(0.001)
    threading.Event().wait(chance.random() * 0.06)
    assert victim is not None
    if processes.ranks[killed].is_alive():
        os.kill(victim, signal.SIGKILL)
    codes = processes.join(60)
    assert [code for rank, code in enumerate(codes) if rank != killed] == [0] * (world_size - 1), codes
    check(job, [processes.learnt(rank) if rank != killed else [] for rank in range(world_size)], killed, tally)
    size = 1 + chance.randrange(world_size)
    again = Job(root, str(folder / "second"), size, address, run_id="2")
    second = Processes(again, [[("again", "commit")]] * size)
    assert second.join(60) == [0] * size
    assert all([record["outcome"] for record in second.learnt(rank)] == ["ok", "closed"] for rank in range(size))
    assert Catalog(root).verify("again").ok
    left = [name for name in os.listdir(root) if name.startswith(".")]
    assert left == [], left
    tally.jobs += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    parser.add_argument("--stores", nargs="+", default=["tcp", "file", "zero"], choices=["tcp", "file", "zero"])
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    logging.getLogger("async_ckpt").setLevel(logging.CRITICAL)
    tally = Tally()
    for seed in range(options.seed, options.seed + options.jobs):
        folder = Path(tempfile.mkdtemp(prefix="async-ckpt-kill-"))
        try:
            ranks = options.ranks[seed % len(options.ranks)]
            kill_one(folder, ranks, seed, tally, options.stores[seed // len(options.ranks) % len(options.stores)])
        except BaseException:
            print(f"seed {seed}: see {folder}")
            raise
        shutil.rmtree(folder)
        print(f"seed {seed}: {tally}", flush=True)


if __name__ == "__main__":
    main()
