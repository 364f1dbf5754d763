"""`prewarm`: what a first save would pay is paid before it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, UnsafePathError, UnsupportedStateError
from tests.support.insides import arena_of

CHUNK = 1 << 20


def make_engine(root: Path) -> AsyncCheckpointEngine:
    return AsyncCheckpointEngine(root, staging_bytes=16 * CHUNK, chunk_bytes=CHUNK)


@pytest.mark.wide
def test_a_state_planned_ahead_is_cached_at_its_first_save(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(700, 700), torch.nn.Linear(700, 3))
    with make_engine(tmp_path) as engine:
        engine.prewarm(states={"sub/model.pt": model.state_dict(), "extra.pt": {"step": 0}})
        assert arena_of(engine).num_faulted >= 3
        with torch.no_grad():
            model[0].weight.add_(1)
        engine.create("t")
        engine.save(model.state_dict(), "sub/model.pt")
        engine.save({"step": 7}, "extra.pt")
        pending = engine.commit("t")
        pending.result(60)
        saves = {save.path: save for save in pending.metrics.saves}
        assert saves["sub/model.pt"].plan_cached and saves["extra.pt"].plan_cached
        loaded = engine.load("t/sub/model.pt")
        assert all(torch.equal(loaded[key], value) for key, value in model.state_dict().items())
        assert engine.load("t/extra.pt") == {"step": 7}


def test_all_staging_memory_is_touched_without_a_size(tmp_path: Path) -> None:
    with make_engine(tmp_path) as engine:
        engine.prewarm()
        assert arena_of(engine).num_faulted == arena_of(engine).num_chunks


def test_a_state_that_cannot_be_saved_is_refused_with_its_path(tmp_path: Path) -> None:
    with make_engine(tmp_path) as engine:
        with pytest.raises(UnsupportedStateError, match=r"\['f'\]"):
            engine.prewarm(states={"a.pt": {"f": lambda: None}})
        with pytest.raises(UnsafePathError):
            engine.prewarm(states={"../a.pt": {}})
        assert engine.pending() == [] and engine.tags() == []
