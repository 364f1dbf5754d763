"""What the cases share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from async_ckpt import AsyncCheckpointEngine

DEVICE = torch.device("simulated", 0)
OTHER = torch.device("simulated", 1)
SIZE = 1 << 16
"""Elements of a tensor that is several chunks long."""
TIMEOUT_S = 60.0


@contextlib.contextmanager
def on(stream: torch.Stream) -> Iterator[torch.Stream]:
    """What the block queues goes to `stream`."""
    before = torch.accelerator.current_stream()
    torch.accelerator.set_stream(stream)
    try:
        yield stream
    finally:
        torch.accelerator.set_stream(before)


def engine(root: Path, **options: Any) -> AsyncCheckpointEngine:
    """Small chunks, so that a tensor takes several."""
    return AsyncCheckpointEngine(root, **{"staging_bytes": 4 << 20, "chunk_bytes": 64 << 10, **options})


def saved(made: AsyncCheckpointEngine, tag: str, **files: Any) -> Any:
    """One checkpoint of these files (`model=...` is "model.pt"), committed; the pending commit."""
    made.create(tag)
    for name, state in files.items():
        made.save(state, f"{name}.pt")
    return made.commit(tag)


def on_disk(root: Path, tag: str, name: str = "model") -> Any:
    """What torch itself reads."""
    return torch.load(root / tag / f"{name}.pt", map_location="cpu")


def distinct(tensor: torch.Tensor) -> list[float]:
    """The values that a tensor holds."""
    return sorted(set(tensor.cpu().flatten().tolist()))
