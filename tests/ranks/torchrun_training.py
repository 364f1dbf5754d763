"""A small training of several ranks for test_torchrun.py; run by ``torchrun ... -m tests.ranks.torchrun_training ROOT
OUT NUM_STEPS``.

Every rank writes what it has done to OUT/rank<r>.json; rank r's pid is in OUT/pid<r> once it trains.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from async_ckpt import AsyncCheckpointEngine, CheckpointPacer, KeepLast, RankCoordinator
from async_ckpt.storage.filesystem import FileSystem

NUM_STEPS = 100_000


class CountingDeletions(FileSystem):
    """Counts the checkpoints that this process takes away."""

    num_deleted = 0

    def rename_noreplace(self, src: str, dst: str) -> None:
        super().rename_noreplace(src, dst)
        self.num_deleted += os.path.basename(dst).startswith(".trash.") and not os.path.basename(src).startswith(".")

    def rename(self, src: str, dst: str) -> None:
        super().rename(src, dst)
        self.num_deleted += os.path.basename(dst).startswith(".trash.") and not os.path.basename(src).startswith(".")


def anywhere(flag: bool) -> bool:
    """Whether any rank says so; the same answer on all."""
    said = torch.tensor(int(flag))
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said)


def first_says(flag: bool) -> bool:
    """Rank 0's word, on all ranks."""
    said = torch.tensor(int(flag))
    dist.broadcast(said, src=0)
    return bool(said)


def main(root: str, out: str, num_steps: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(64, 64))
    optimizer = torch.optim.AdamW(model.parameters())
    coordinator, filesystem = RankCoordinator.from_env(timeout_s=60.0), CountingDeletions()
    pacer = CheckpointPacer(overhead=0.5)
    learnt: dict[str, Any] = {"saved": [], "stopped_at": None}
    options: dict[str, Any] = {"staging_bytes": 8 << 20, "chunk_bytes": 65536, "retention": KeepLast(2)}
    with AsyncCheckpointEngine(root, coordinator=coordinator, filesystem=filesystem, **options) as engine:
        learnt["before"] = [engine.latest(), coordinator.latest_on_all()]
        step = start = engine.load(f"{learnt['before'][1]}/train.pt")["step"] if learnt["before"][1] else 0

        def save(tag: str) -> Any:
            engine.create(tag)
            if rank == 0:
                engine.save(
                    {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, "train.pt"
                )
            engine.save({"random": torch.get_rng_state(), "step": step}, f"rank-{rank}.pt")
            return engine.commit(tag, {"step": step})

        engine.on_preemption(deadline_s=40.0, save=lambda: save(f"last-{step}"), agree=anywhere)
        for step in range(start + 1, start + int(num_steps) + 1):
            model(torch.randn(8, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            # The clocks differ: rank 0 asks its pacer, all do what it says.
            if first_says(rank == 0 and pacer.should_save(step)):
                learnt["saved"].append(step)
                pacer.saved(save(f"step-{step}"))
            if step == start + 20:
                Path(out, f"pid{rank}").write_text(str(os.getpid()))
            if engine.poll_preemption():
                break
        for pending in engine.pending():
            pending.result()
        learnt |= {
            "stopped_at": step,
            "preempted": engine.preempted,
            "after": [engine.latest(), coordinator.latest_on_all()],
        }
    outcome = engine.preemption_outcome
    learnt |= {
        "deleted": filesystem.num_deleted,
        "ok": outcome is None or outcome.ok,
        "signal": outcome and outcome.signal_name,
    }
    Path(out, f"rank{rank}.json").write_text(json.dumps(learnt))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
