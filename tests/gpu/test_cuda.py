"""Snapshots of CUDA tensors: ordered by streams, through pinned memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SIZE = 1 << 20
TIMEOUT_S = 120.0


@pytest.fixture
def engine(tmp_path: Path) -> Any:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=128 << 20, chunk_bytes=1 << 20) as made:
        yield made


def busy() -> None:
    """Keeps the current stream at work for a while, so that what is queued behind it has not run yet."""
    torch.cuda._sleep(200_000_000)


def saved(engine: AsyncCheckpointEngine, tag: str, state: Any) -> None:
    engine.create(tag)
    engine.save(state, "s.pt")


def test_staging_memory_is_pinned(engine: AsyncCheckpointEngine) -> None:
    engine.prewarm()
    assert engine._arena.pinned
    [chunk] = engine._arena.try_reserve(1) or []
    assert chunk.tensor.is_pinned()
    engine._arena.release(chunk)


@pytest.mark.parametrize("is_default_stream", [True, False])
def test_kernels_before_the_save_are_in_it_and_kernels_after_are_not(
    engine: AsyncCheckpointEngine, tmp_path: Path, is_default_stream: bool
) -> None:
    stream = torch.cuda.current_stream() if is_default_stream else torch.cuda.Stream()
    with torch.cuda.stream(stream):
        weight = torch.zeros(SIZE, device="cuda")
        busy()
        weight.add_(1)
        saved(engine, "t", {"w": weight})
        weight.add_(1)
        engine.commit("t").result(TIMEOUT_S)
    stream.synchronize()
    assert torch.load(tmp_path / "t" / "s.pt", map_location="cpu")["w"].unique().tolist() == [1]
    assert weight.unique().tolist() == [2]


def test_a_guarded_step_is_queued_behind_the_copies(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(SIZE, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    engine.guard(optimizer)
    for step in range(5):
        weight.grad = torch.ones_like(weight)
        busy()
        saved(engine, f"step-{step}", {"w": weight.detach()})
        pending = engine.commit(f"step-{step}")
        optimizer.step()
        pending.result(TIMEOUT_S)
        assert pending.metrics.saves[0].mode == "lazy"
    for step in range(5):
        assert torch.load(tmp_path / f"step-{step}" / "s.pt", map_location="cpu")["w"].unique().tolist() == [1.0 - step]


def test_views_shared_storages_and_cpu_tensors_beside(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    base = torch.arange(SIZE, dtype=torch.float32, device="cuda").reshape(1024, -1)
    state = {
        "base": base,
        "transposed": base.t(),
        "row": base[3],
        "half": base.to(torch.bfloat16)[::2],
        "cpu": torch.arange(77),
        "empty": torch.empty(0, device="cuda"),
    }
    wanted = {name: tensor.cpu().clone() for name, tensor in state.items()}
    saved(engine, "t", state)
    engine.commit("t").result(TIMEOUT_S)
    for loaded in (torch.load(tmp_path / "t" / "s.pt"), engine.load("t/s.pt"), engine.load("t/s.pt", map_location="cpu")):
        assert all(torch.equal(loaded[name].cpu(), tensor) for name, tensor in wanted.items())
        assert loaded["transposed"].untyped_storage().data_ptr() == loaded["base"].untyped_storage().data_ptr()


def test_load_into_reads_into_device_memory(engine: AsyncCheckpointEngine) -> None:
    wanted = torch.randn(SIZE, device="cuda")
    saved(engine, "t", {"w": wanted})
    engine.commit("t").result(TIMEOUT_S)
    target = {"w": torch.zeros(SIZE, device="cuda")}
    engine.load_into(target, "t/s.pt")
    assert torch.equal(target["w"], wanted)


def test_a_state_larger_than_the_staging_memory_streams_through(tmp_path: Path) -> None:
    state = {f"w{k}": torch.full((SIZE,), float(k), device="cuda") for k in range(16)}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=16 << 20, chunk_bytes=1 << 20) as engine:
        saved(engine, "t", state)
        for tensor in state.values():
            tensor.zero_()
        engine.commit("t").result(TIMEOUT_S)
    loaded = torch.load(tmp_path / "t" / "s.pt", map_location="cpu")
    assert [loaded[f"w{k}"].unique().tolist() for k in range(16)] == [[float(k)] for k in range(16)]
