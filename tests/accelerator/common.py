"""What the cases share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from async_ckpt import AsyncCheckpointEngine
from tests.support.insides import arena_of, guard_of

_KIND = torch.accelerator.current_accelerator()
assert _KIND is not None, "these cases run where there is an accelerator, real or simulated"
DEVICE = torch.device(_KIND.type, 0)
OTHER = torch.device(_KIND.type, torch.accelerator.device_count() - 1)
SIZE = 1 << 16
"""Elements of a tensor that is several chunks long."""
TIMEOUT_S = 60.0


def busy(device: torch.device) -> None:
    """Keeps a real device's current stream at work, so that what is queued behind it has not run yet."""
    if device.type != "simulated":
        matrix = torch.ones(4096, 4096, device=device)
        for _ in range(20):
            matrix @ matrix


@contextlib.contextmanager
def on(stream: torch.Stream) -> Iterator[torch.Stream]:
    """What the block queues goes to `stream`."""
    outer, inner = torch.accelerator.current_stream(), torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    try:
        yield stream
    finally:
        torch.accelerator.set_stream(inner)
        torch.accelerator.set_stream(outer)


def engine(root: Path, **options: Any) -> AsyncCheckpointEngine:
    """Small chunks, so that a tensor takes several."""
    return AsyncCheckpointEngine(root, **{"staging_bytes": 4 << 20, "chunk_bytes": 64 << 10, **options})


def guarded(value: float = 1.0, device: torch.device = DEVICE) -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
    """A weight, and an optimizer to be guarded whose step takes 1 away from it."""
    weight = torch.nn.Parameter(torch.full((SIZE,), value, device=device))
    weight.grad = torch.ones_like(weight)
    return weight, torch.optim.SGD([weight], lr=1.0)


@contextlib.contextmanager
def all_chunks(made: AsyncCheckpointEngine) -> Iterator[list[Any]]:
    """All of an engine's staging memory, for the block."""
    arena = arena_of(made)
    chunks = arena.try_reserve(arena.num_chunks) or []
    yield chunks
    for chunk in chunks:
        arena.release(chunk)


def saved(made: AsyncCheckpointEngine, tag: str, **files: Any) -> Any:
    """One checkpoint of these files (`model=...` is "model.pt"), committed; the pending commit."""
    made.create(tag)
    for name, state in files.items():
        made.save(state, f"{name}.pt")
    return made.commit(tag)


def wait_until_queued(made: AsyncCheckpointEngine) -> None:
    """Until the lazy copies are in the devices' queues, without ordering anything behind them."""
    for copy in guard_of(made).copies:
        copy.queued.result(TIMEOUT_S)


def on_disk(root: Path, tag: str, name: str = "model") -> Any:
    """What torch itself reads."""
    return torch.load(root / tag / f"{name}.pt", map_location="cpu")


def distinct(tensor: torch.Tensor) -> list[float]:
    """The values that a tensor holds."""
    return sorted(set(tensor.cpu().flatten().tolist()))
