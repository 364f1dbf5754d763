"""One rank of a job that commits and mirrors: ``python -m tests.mirror.rank_job RANK WORLD PORT ROOT URL OPTIONS
ACT``."""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from async_ckpt import AsyncCheckpointEngine, Mirror
from async_ckpt.ranks.rank_coordinator import RankCoordinator


def main() -> None:
    rank, world, port, root, url, options, act = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:8]
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=timedelta(seconds=30))
    coordinator = RankCoordinator(store, rank, world, timeout_s=4.0 if act == "die" else 30.0, run_id=act)
    mirror = Mirror(url, part_bytes=5 << 20, retry_timeout_s=45, options=json.loads(options))
    engine = AsyncCheckpointEngine(
        root, staging_bytes=16 << 20, coordinator=coordinator, mirrors=(mirror,), uploaders_per_node=1
    )
    said = []
    for step in range(2):
        engine.create(f"step-{step}")
        engine.save({"w": torch.full((1000,), float(rank))}, f"rank-{rank}.pt")
        pending = engine.commit(f"step-{step}")
        pending.result(60)
        if act == "die" and rank == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        error = pending.mirrored.exception(60) if pending.mirrored is not None else None
        said.append(None if error is None else str(error))
    print(json.dumps(said), flush=True)
    engine.close()


if __name__ == "__main__":
    main()
