"""A training that commits, replaces, gives up and prunes as fast as it can: python -m tests.cli.live_training ROOT

Every tensor of a checkpoint has the value of its step, so that a reader can tell a mixed one. Ends when standard input
does.
"""

from __future__ import annotations

import select
import sys

import torch

from async_ckpt import AsyncCheckpointEngine, KeepLast


def main(root: str) -> None:
    step = 0
    with AsyncCheckpointEngine(
        root, staging_bytes=8 << 20, chunk_bytes=64 << 10, overwrite="replace", retention=KeepLast(3), num_writers=2
    ) as engine:
        while not select.select([sys.stdin], [], [], 0)[0]:
            step += 1
            tag = "same" if step % 3 == 0 else f"step-{step}"
            engine.create(tag)
            value = float(step)
            engine.save(
                {"a": torch.full((30_000,), value), "b": {"c": torch.full((500,), value)}, "step": step}, "model.pt"
            )
            engine.save({"momentum": torch.full((9_000,), value)}, "sub/optim.pt")
            if step % 7 == 0:
                engine.abort(tag)
            else:
                pending = engine.commit(tag, {"step": step})
            if step == 4:
                pending.result()
                print("ready", flush=True)
    print("saves", step, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
