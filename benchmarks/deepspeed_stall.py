"""How long `save_checkpoint` blocks training: DeepSpeed's own torch engine against the attached one, real DeepSpeed on
CPU.

    python -m benchmarks.deepspeed_stall DIRECTORY [--megabytes 200] [--saves 5] [--stages 0 1 2 3] [--out FOLDER]

One process per row. A save is timed from the call to the return; a few training steps lie between any two saves, and
no save starts before the one before it is on disk (the stock engine's files are synced for that, outside the timing).
The first save is a row's own column: it still plans the files and meets cold memory. The stock engine syncs nothing
itself: what it blocks for is the page cache's speed, not the disk's.
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.contenders.base import single_rank_environment, sync_tree, tree_bytes
from benchmarks.environment import describe
from benchmarks.results import in_own_process, keep, parser_of, reduced

CONTENDERS = {"stock torch engine": None, "attached": {}, "attached, guard=True": {"guard": True}}
WIDTH = 512


def make_engine(stage: int, megabytes: int) -> Any:
    """A stack of linear and BatchNorm layers whose checkpoint has about that size."""
    import deepspeed
    import torch

    # Otherwise DeepSpeed compiles its shared-memory reduction first; it is not used by one rank.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    copies = 3 if stage == 0 else 4
    depth = max(1, round(megabytes * 1e6 / (4 * copies * WIDTH * (WIDTH + 3))))
    layers = [layer for _ in range(depth) for layer in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.BatchNorm1d(WIDTH))]
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "steps_per_print": 1000000,
    }
    engine, *_ = deepspeed.initialize(model=torch.nn.Sequential(*layers), config=config)
    return engine


def train(engine: Any, num_steps: int) -> None:
    import torch

    for _ in range(num_steps):
        loss = engine(torch.randn(4, WIDTH)).pow(2).mean()
        engine.backward(loss)
        engine.step()


def measure(directory: Path, contender: str, stage: int, megabytes: int, num_saves: int) -> dict[str, Any]:
    """One row. Runs in a process of its own."""
    single_rank_environment()
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("MASTER_PORT", "29533")
    engine = make_engine(stage, megabytes)
    options, checkpointer = CONTENDERS[contender], None
    if options is not None:
        from async_ckpt.integrations.deepspeed import attach

        checkpointer = attach(engine, directory, staging_bytes=3 * megabytes << 20, **options)
        assert checkpointer.engine is not None
        checkpointer.engine.prewarm()
    train(engine, 2)
    blocked_s, durable_s = [], []
    for number in range(num_saves + 1):
        tag = f"save{number}"
        started = time.perf_counter()
        engine.save_checkpoint(str(directory), tag=tag)
        blocked_s.append(time.perf_counter() - started)
        train(engine, 2)
        if checkpointer is not None:
            checkpointer.drain()
        else:
            sync_tree(directory / tag)
        durable_s.append(time.perf_counter() - started)
        size_bytes = tree_bytes(directory / tag)
        if number:
            shutil.rmtree(directory / f"save{number - 1}")
    found = {
        "contender": contender,
        "stage": stage,
        "size_bytes": size_bytes,
        "num_parameters": len(list(engine.module.parameters())),
        "first_blocked_s": blocked_s[0],
        "blocked_s": blocked_s[1:],
        "blocked_s_per_200_mb": statistics.median(blocked_s[1:]) * 200e6 / size_bytes,
        "durable_s": durable_s[1:],
        "load_average": os.getloadavg()[0],
    }
    engine.destroy()
    return found


def main() -> None:
    parser = parser_of(__doc__, megabytes=200, saves=5)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    measured_on = describe(given.directory)
    # As torchrun sets it; on a machine with other work, two spinning threads would time each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    print("| ZeRO | engine | size MB | first save s | blocked s, median (max) | per 200 MB | durable after s |")
    print("|---|---|---|---|---|---|---|")
    for stage, contender in itertools.product(given.stages, CONTENDERS):
        own = given.directory / f"{stage}-{contender.replace(' ', '-')}"
        own.mkdir()
        rows.append(in_own_process(measure, own, contender, stage, given.megabytes, given.saves))
        shutil.rmtree(own)
        row, blocked = rows[-1], reduced(rows[-1]["blocked_s"])
        print(
            f"| {stage} | {contender} | {row['size_bytes'] / 1e6:.0f} | {row['first_blocked_s']:.3f} | "
            f"{blocked.median:.3f} ({blocked.high:.3f}) | {row['blocked_s_per_200_mb']:.3f} | "
            f"{statistics.median(row['durable_s']):.2f} |",
            flush=True,
        )
    keep(given, "deepspeed_stall", {"rows": rows}, measured_on)


if __name__ == "__main__":
    main()
