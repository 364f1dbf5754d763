"""More scenarios for one rank: guarded copies byte by byte, experts, DeepSpeed's converters, offloaded optimizers,
sudden ends.
"""

from __future__ import annotations

import argparse
import os
import threading
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

from async_ckpt import Catalog, ConfigError, KeepLast
from async_ckpt.integrations.deepspeed import AsyncDeepSpeedEngine, attach
from tests.integrations.deepspeed.one_rank import SMALL, Modes, load_stock
from tests.integrations.deepspeed.world import FEATURES, config, differences, make, state_of, train
from tests.support.comparing import torch_bytes
from tests.support.insides import commits_of


class Twice:
    """Keeps what `torch.save` makes of every state at the very call that the engine gets it in."""

    def __init__(self, checkpointer: AsyncDeepSpeedEngine) -> None:
        self.expected: dict[str, bytes] = {}
        self._save = checkpointer.save
        checkpointer.save = self  # type: ignore[method-assign, assignment]

    def __call__(self, state_dict: Any, path: str) -> None:
        self.expected[str(path)] = torch_bytes(state_dict)
        self._save(state_dict, path)


class LateCopies:
    """Holds the lazy copies back until the optimizer's own step begins: the latest moment at which they may still
    run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._gate = threading.Event()
        guarded = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            # Around the guard, so that the gate is open when the guard waits.
            self._gate.set()
            return guarded(*args, **kwargs)

        optimizer.step = step  # type: ignore[method-assign]

    def close(self, checkpointer: AsyncDeepSpeedEngine) -> None:
        self._gate = gate = threading.Event()
        assert checkpointer.engine is not None
        commits_of(checkpointer.engine).pool.copier.submit(lambda: gate.wait(60) and None)


def bottom(engine: Any) -> torch.optim.Optimizer:
    inner = engine.optimizer
    while not isinstance(inner, torch.optim.Optimizer):
        inner = inner.optimizer
    return inner


def guarded_bytes(directory: Path, stage: str, dtype: str, num_saves: str = "20") -> None:
    """Copied as late as the guard allows, while DeepSpeed trains on, each file is what torch.save wrote at the call."""
    engine = make(int(stage), dtype)
    modes = Modes()
    checkpointer = attach(engine, directory, guard=True, observers=(modes,), retention=KeepLast(2), **SMALL)
    late = LateCopies(bottom(engine))
    twice = Twice(checkpointer)
    train(engine, 1)
    for number in range(int(num_saves)):
        late.close(checkpointer)
        engine.save_checkpoint(str(directory), tag=f"s{number}")
        train(engine, 1, seed=number)
        checkpointer.drain()
        for path, expected in twice.expected.items():
            assert Path(path).read_bytes() == expected, f"{path} is not what was saved"
        twice.expected.clear()
    assert "lazy" in modes.seen
    engine.destroy()


def guard_refusals(directory: Path) -> None:
    """Optimizers whose tensors change before their own step are not guarded."""
    engine = make(2)
    train(engine, 1)
    engine.optimizer.use_muon = True
    with pytest.raises(ConfigError, match="Muon's momentum"):
        attach(engine, directory, guard=True)
    engine.optimizer.use_muon = False
    engine.optimizer.zenflow = True
    with pytest.raises(ConfigError, match="ZenFlow"):
        attach(engine, directory, guard=True)
    engine.optimizer.zenflow = False
    engine.optimizer.swap_optimizer = True
    with pytest.raises(ConfigError, match="swapped"):
        attach(engine, directory, guard=True)
    engine.optimizer.swap_optimizer = False
    engine.optimizer.__class__ = type("SuperOffloadOptimizer", (type(engine.optimizer),), {})
    with pytest.raises(ConfigError, match="SuperOffloadOptimizer"):
        attach(engine, directory, guard=True)
    engine.destroy()


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(FEATURES, FEATURES)
        self.moe = MoE(FEATURES, torch.nn.Linear(FEATURES, FEATURES), num_experts=2, ep_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, loss, _ = self.moe(self.first(x))
        found: torch.Tensor = out + loss
        return found


def make_experts(seed: int) -> Any:
    torch.manual_seed(seed)
    deepspeed.init_distributed("gloo")
    model = Experts()
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "parameters"}
    )
    optimizer = torch.optim.Adam(groups, lr=1e-2)
    settings = config(0, "fp32")
    del settings["optimizer"]
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def experts(directory: Path) -> None:
    """Expert files hold the bytes of their expert, under DeepSpeed's names, and stock DeepSpeed loads them."""
    engine = make_experts(0)
    attach(engine, directory, **SMALL)
    train(engine, 2)
    expected = state_of(engine)
    engine.save_checkpoint(str(directory))
    train(engine, 2)
    assert differences(expected, state_of(engine))
    engine.destroy()
    names = {path.name for path in (directory / "global_step2").iterdir()}
    assert {"layer_0_expert_0_mp_rank_00_model_states.pt", "layer_0_expert_1_mp_rank_00_model_states.pt"} <= names
    assert Catalog(directory).verify("global_step2").ok
    stock = make_experts(9)
    path, _ = stock.load_checkpoint(str(directory))
    assert path is not None
    assert differences(expected, state_of(stock)) == []
    ours = make_experts(5)
    attach(ours, directory, **SMALL)
    path, _ = ours.load_checkpoint(str(directory))
    assert path is not None
    assert differences(expected, state_of(ours)) == []
    ours.destroy()


def universal(directory: Path, stage: str) -> None:
    """`ds_to_universal` on the result, and the universal checkpoint loaded, by stock DeepSpeed and with the engine
    attached.
    """
    engine = make(int(stage))
    attach(engine, directory, **SMALL)
    train(engine, 2)
    expected = state_of(engine)
    universal_info = {"universal_checkpoint_info": {}}
    engine.save_checkpoint(str(directory), client_state=universal_info)
    engine.destroy()
    converted = directory / "global_step2_universal"
    arguments = argparse.Namespace(
        input_folder=str(directory / "global_step2"),
        output_folder=str(converted),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    ds_to_universal.main(arguments)
    (directory / "latest_universal").write_text(converted.name)
    for is_ours in (False, True):
        again = make(int(stage), seed=7, checkpoint={"load_universal": True})
        if is_ours:
            attach(again, directory, **SMALL)
        path, _ = again.load_checkpoint(str(directory), tag=converted.name)
        assert path is not None
        found = state_of(again)
        assert differences(expected["model"], found["model"]) == []
        assert found["steps"] == expected["steps"]
        again.destroy()


def offloaded(directory: Path, stage: str, device: str) -> None:
    """The optimizer on the CPU: training goes on bit for bit. Swapped to files: they become part of the checkpoint.

    Stock DeepSpeed 0.19.8 does not bring the weights back from its own checkpoint of swapped tensors; then ours loads
    as it does.
    """
    settings: dict[str, Any] = {"stage": int(stage), "offload_optimizer": {"device": device}}
    if device == "nvme":
        settings["offload_optimizer"] |= {"nvme_path": str(directory / "nvme")}
    more = {"zero_optimization": settings, "zero_force_ds_cpu_optimizer": False}
    saved = directory / "saved"

    def make_wide(seed: int) -> Any:
        torch.manual_seed(seed)
        # DeepSpeed swaps nothing below a megabyte.
        model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 20_000), torch.nn.Linear(20_000, FEATURES))
        return deepspeed.initialize(model=model, config={**config(int(stage), "fp32"), **more})[0]

    engine = make_wide(0)
    attach(engine, saved, **SMALL)
    train(engine, 2)
    expected = state_of(engine)["model"]
    swapped: dict[str, bytes] = {}
    if device == "nvme":
        folder = Path(engine.optimizer.optimizer_swapper.swap_folder)
        swapped = {path.name: path.read_bytes() for path in folder.iterdir() if "gradient" not in path.name}
    engine.save_checkpoint(str(saved))
    train(engine, 2)
    later = state_of(engine)["model"]
    engine.destroy()
    assert Catalog(saved).verify("global_step2").ok
    listed = {entry.path for entry in Catalog(saved).manifest("global_step2").files}
    for name, content in swapped.items():
        assert f"offloaded_tensors/rank00/{name}" in listed
        assert (saved / "global_step2" / "offloaded_tensors" / "rank00" / name).read_bytes() == content
    assert bool(swapped) == (device == "nvme"), "DeepSpeed swapped nothing"
    for is_ours in (False, True):
        again = make_wide(7)
        if is_ours:
            attach(again, saved, **SMALL)
        path, _ = again.load_checkpoint(str(saved))
        assert path is not None
        found = state_of(again)["model"]
        train(again, 2)
        if device == "nvme" and not is_ours:
            expected, later = found, state_of(again)["model"]
        assert differences(expected, found) == []
        assert differences(later, state_of(again)["model"]) == []
        again.destroy()


def saves_until_killed(directory: Path) -> None:
    """Never returns: somebody else kills the process. Says on standard output when it has begun."""
    own = directory.parent / "killed"
    engine = make(2)
    attach(engine, own, retention=KeepLast(3), **SMALL)
    number = 0
    while True:
        train(engine, 1)
        engine.save_checkpoint(str(own), tag=f"s{number}")
        number += 1


def loads_what_latest_names(directory: Path) -> None:
    """After a sudden end: `latest` names a whole checkpoint, stock DeepSpeed loads it, and saving goes on."""
    own = directory.parent / "killed"
    named = (own / "latest").read_text()
    assert Catalog(own).verify(named).ok
    if os.environ["WORLD_SIZE"] == "1":
        load_stock(own, 2, "fp32")
    engine = make(2, seed=3)
    attach(engine, own, **SMALL)
    path, _ = engine.load_checkpoint(str(own))
    assert path is not None and named in path
    train(engine, 1)
    engine.save_checkpoint(str(own), tag="after")
    engine.destroy()
    assert (own / "latest").read_text() == "after" and Catalog(own).verify("after").ok
