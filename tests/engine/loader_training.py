"""A small training with DataLoader workers, for the tests of signals to a whole process group.

    python -m tests.engine.loader_training ROOT

Prints "at step" at each of `NUM_STEPS` steps, then goes on reading batches until its workers die of a signal, and the
loop of that: inside an optimizer's step it could not be told where, and nothing would be saved.
"""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader, IterableDataset

from async_ckpt import AsyncCheckpointEngine

NUM_STEPS = 20


class Endless(IterableDataset):
    """Rows without an end."""

    def __iter__(self):
        while True:
            yield torch.randn(64)


def main(root: str) -> None:
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    position = {"step": 0}
    loader = DataLoader(Endless(), batch_size=8, num_workers=2)
    with AsyncCheckpointEngine(root, staging_bytes=4 << 20, chunk_bytes=1 << 20) as engine:

        def save() -> None:
            tag = f"last-{position['step']}"
            engine.create(tag)
            engine.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": position["step"]}, "state.pt"
            )
            engine.commit(tag)

        engine.on_preemption(deadline_s=30.0, save=save)
        for batch in loader:
            if position["step"] == NUM_STEPS:
                continue
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            position["step"] += 1
            print("at step", position["step"], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
