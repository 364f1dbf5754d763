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
from async_ckpt.ranks.rank_coordinator import Node, RankCoordinator


def main() -> None:
    rank, world, port, root, url, options, act = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:8]
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timeout=timedelta(seconds=120))
    # The time of every wait, also for the rank that is dead.
    timeout_s = 8.0 if act == "die" else 120.0
    node = None
    if act == "nodes":
        # Two ranks on the first node, one on the second, each node with a root of its own.
        node = Node(0, 2, (0, 1)) if rank < 2 else Node(1, 2, (2,))
        root = os.path.join(root, f"node-{node.number}")
    # Some take long to start; what is timed begins when all are here.
    _meet(store, f"{act}-start", world)
    coordinator = RankCoordinator(store, rank, world, timeout_s=timeout_s, run_id=act, node=node)
    mirror = Mirror(url, part_bytes=5 << 20, retry_timeout_s=45, options=json.loads(options))
    engine = AsyncCheckpointEngine(
        root, staging_bytes=16 << 20, coordinator=coordinator, mirrors=(mirror,), uploaders_per_node=1
    )
    said = []
    for step in range(2):
        engine.create(f"step-{step}")
        engine.save({"w": torch.full((1000,), float(rank))}, f"rank-{rank}.pt")
        # So may a rank to try the store.
        _meet(store, f"{act}-{step}", world)
        pending = engine.commit(f"step-{step}")
        pending.result(120)
        if act == "die" and rank == 1 and step == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        error = pending.mirrored.exception(120) if pending.mirrored is not None else None
        said.append(None if error is None else str(error))
    print(json.dumps(said), flush=True)
    engine.close()
    # The store lives with rank 0.
    if rank == 0 and act != "die":
        store.wait([f"end-{other}" for other in range(1, world)])
    elif rank:
        store.set(f"end-{rank}", "here")


def _meet(store: dist.Store, name: str, world: int) -> None:
    if store.add(name, 1) == world:
        store.set(f"{name}-all", "here")
    store.wait([f"{name}-all"])


if __name__ == "__main__":
    main()
