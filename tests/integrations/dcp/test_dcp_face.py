"""`save_sharded` and `load_sharded`: plain, DDP and FSDP2 models alike, and what is wrong is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from async_ckpt import (
    AsyncCheckpointEngine,
    Catalog,
    CheckpointNotFoundError,
    ConfigError,
    UnsafePathError,
    UnsupportedStateError,
)
from async_ckpt.errors import StateMismatchError
from async_ckpt.integrations.dcp import TrainingState, load_sharded, save_sharded
from tests.integrations.dcp import work
from tests.integrations.dcp.test_dcp_ranks import assert_same
from tests.support.processes import run_ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated"),
    pytest.mark.wide,
]


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp2"])
def test_any_kind_of_model_resumes_as_any_other(tmp_path: Path, kind: str) -> None:
    root = str(tmp_path / "root")
    expected = run_ranks(tmp_path / "p", 2, work.save_face, root, kind)[0]
    assert Catalog(root).verify("s1").ok
    for other, world_size in (("ddp", 2), ("fsdp2", 3), ("plain", 1)):
        for found in run_ranks(tmp_path / "p", world_size, work.load_face, root, other):
            assert_same(found, expected, f"{kind} as {other}")


def make_training(size: int = 3) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(size, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, size)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_is_wrong_is_said_and_the_tag_stays_free(tmp_path: Path) -> None:
    model, optimizer = make_training()
    bad: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (model, {}, UnsupportedStateError, "TrainingState"),
        ([1], {}, UnsupportedStateError, "must be a dict"),
        ({"x": lambda: 1}, {}, UnsupportedStateError, "'x' cannot be saved"),
        ({"x": 1}, {"metadata": {"y": object()}}, UnsupportedStateError, "not JSON"),
    ]
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        for state, options, kind, message in bad:
            with pytest.raises(kind, match=message):
                save_sharded(engine, "a", state, **options)
        with pytest.raises(ConfigError, match="AsyncCheckpointEngine"):
            save_sharded(str(tmp_path), "a", {"x": 1})  # type: ignore[arg-type]
        with pytest.raises(UnsafePathError):
            save_sharded(engine, "../a", {"x": 1})
        save_sharded(engine, "a", {"train": TrainingState(model, optimizer), "step": 3}).result()
        assert engine.tags() == ["a"]


def test_a_state_that_does_not_fit_the_checkpoint(tmp_path: Path) -> None:
    model, optimizer = make_training()
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        save_sharded(engine, "a", {"train": TrainingState(model, optimizer), "step": 3}).result()
        engine.create("files")
        engine.save({"x": 1}, "x.pt")
        engine.commit("files").result()
        nested = torch.nn.Sequential(torch.nn.Linear(3, 3))
        wrong = {
            "new": {"train": TrainingState(model, optimizer), "new": torch.zeros(2)},
            "train.model.0.weight": {"train": TrainingState(nested)},
            "train.model.weight": {"train": TrainingState(torch.nn.Linear(4, 3))},
            "momentum": {"train": TrainingState(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))},
        }
        for name, state in wrong.items():
            with pytest.raises(StateMismatchError, match=name):
                load_sharded(engine, "a", state)
        with pytest.raises(CheckpointNotFoundError, match="not in DCP's form"):
            load_sharded(engine, "files", {"x": 0})
        with pytest.raises(UnsupportedStateError, match="must be a dict"):
            load_sharded(engine, "a", model)  # type: ignore[arg-type]
        partial: dict[str, Any] = {"step": 0, "new": torch.zeros(2)}
        load_sharded(engine, "a", partial, planner=DefaultLoadPlanner(allow_partial_load=True))
        assert partial["step"] == 3


def test_a_training_state_of_the_wrong_things() -> None:
    model, optimizer = make_training()
    with pytest.raises(UnsupportedStateError, match="takes a module"):
        TrainingState("model")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedStateError, match="takes a module"):
        TrainingState(model, [optimizer, "optimizer"])  # type: ignore[list-item]
    with pytest.raises(UnsupportedStateError, match="not the model's"):
        TrainingState(model, make_training()[1]).state_dict()
