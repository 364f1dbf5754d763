"""A default device of the caller's is for the tensors that the caller makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, load, load_into


@pytest.fixture(params=["context", "set_default_device"])
def meta_by_default(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "context":
        with torch.device("meta"):
            yield
        return
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def made(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device="cpu")


@pytest.mark.wide
@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_load_and_load_into_give_what_was_saved(tmp_path: Path, meta_by_default: None, format: Any) -> None:
    state = {"plain": made(3), "turned": made(2, 3).t(), "half": made(4).bfloat16()}
    state |= (
        {} if format == "safetensors" else {"sparse": made(2, 2).to_sparse(), "parameter": torch.nn.Parameter(made(2))}
    )
    with AsyncCheckpointEngine(tmp_path, staging_bytes=16 << 20, format=format) as engine:
        engine.create("t")
        engine.save(state, "model.pt")
        engine.commit("t").result(60)
    path = tmp_path / "t" / "model.pt"
    target = {name: torch.zeros_like(tensor, device="cpu") for name, tensor in state.items()}
    load_into(target, path)
    for found in (load(path), target):
        assert all(torch.equal(found[name].to_dense(), tensor.to_dense()) for name, tensor in state.items())
