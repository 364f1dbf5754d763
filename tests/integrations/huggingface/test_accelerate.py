"""Accelerate's whole state through the engine: the same files as `save_state`, exact resume."""

from __future__ import annotations

import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

accelerate = pytest.importorskip("accelerate")

from accelerate import Accelerator  # noqa: E402
from accelerate.optimizer import AcceleratedOptimizer  # noqa: E402
from accelerate.utils import ProjectConfiguration  # noqa: E402

from async_ckpt import (  # noqa: E402
    AsyncCheckpointEngine,
    BackpressureTimeout,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
)
from async_ckpt.integrations.huggingface import load_accelerator_state, save_accelerator_state  # noqa: E402
from tests.support.processes import run_ranks  # noqa: E402

from .accelerate_ranks import (  # noqa: E402
    adopt_in_own_root,
    load_from_own_root,
    load_with_a_lost_commit,
    resume_from_own_root,
)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.wide]

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "chunk_bytes": 65536}


class Counter:
    def __init__(self) -> None:
        self.count = 0
        self.since: Path | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "since": self.since}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Job:
    """Dropout, momentum, a scheduler and a registered object."""

    def __init__(self, **options: Any) -> None:
        self.accelerator = Accelerator(cpu=True, **options)
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.counter = Counter()
        self.net, self.optimizer, self.scheduler = self.accelerator.prepare(net, optimizer, scheduler)
        self.accelerator.register_for_checkpointing(self.counter)

    def step(self) -> float:
        loss = self.net(torch.randn(4, 4)).square().mean()
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.counter.count += 1
        return float(loss)


def test_same_files_and_exact_resume(tmp_path: Path) -> None:
    job = Job()
    with AsyncCheckpointEngine(tmp_path / "ours", **SMALL) as engine:
        engine.guard(job.optimizer)
        before = [job.step() for _ in range(3)]
        job.counter.since = Path("x")
        job.accelerator.save_state(str(tmp_path / "stock"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pending = save_accelerator_state(job.accelerator, engine, "step-3", metadata={"step": 3})
        # Random states hold NumPy arrays, registered objects whatever they like: Accelerate's own load allows it.
        assert not [warning for warning in caught if "load refuses" in str(warning.message)]
        after = [job.step() for _ in range(3)]
        pending.result(60)
    stock, ours = tmp_path / "stock", tmp_path / "ours/step-3"
    assert {p.name for p in ours.iterdir()} == {p.name for p in stock.iterdir()} | {"manifest.json"}
    assert (ours / "model.safetensors").read_bytes() == (stock / "model.safetensors").read_bytes()
    for back in (
        lambda j: load_accelerator_state(j.accelerator, tmp_path / "ours"),
        lambda j: j.accelerator.load_state(str(ours)),
    ):
        second = Job()
        assert back(second) in ("step-3", None)
        assert second.counter.count == 3 and [second.step() for _ in range(3)] == after != before


def test_load_waits_and_verifies(tmp_path: Path) -> None:
    job = Job()
    with AsyncCheckpointEngine(tmp_path, **SMALL) as engine:
        with pytest.raises(CheckpointNotFoundError):
            load_accelerator_state(job.accelerator, engine)
        save_accelerator_state(job.accelerator, engine, "a")
        job.step()
        save_accelerator_state(job.accelerator, engine, "b")
        job.step()
        assert load_accelerator_state(job.accelerator, engine, "a") == "a" and job.counter.count == 0
        assert load_accelerator_state(job.accelerator, engine) == "b" and job.counter.count == 1
        raw = bytearray((tmp_path / "b/model.safetensors").read_bytes())
        raw[-1] ^= 1
        (tmp_path / "b/model.safetensors").write_bytes(raw)
        with pytest.raises(CorruptCheckpointError):
            load_accelerator_state(job.accelerator, engine, "b")
        assert load_accelerator_state(job.accelerator, engine) == "a"


def test_what_another_engine_of_the_process_has_pending_is_named(tmp_path: Path, caplog: Any) -> None:
    from .jobs import HoldingFileSystem

    job, held = Job(), HoldingFileSystem("b")
    with AsyncCheckpointEngine(tmp_path, filesystem=held, **SMALL) as given_up:
        save_accelerator_state(job.accelerator, given_up, "a").result(60)
        save_accelerator_state(job.accelerator, given_up, "b")
        try:
            assert load_accelerator_state(job.accelerator, tmp_path) == "a"
            assert "the commit of 'b'" in caplog.text
        finally:
            held.gate.set()


def test_a_failing_save_gives_the_tag_up(tmp_path: Path) -> None:
    job = Job()
    job.counter.state_dict = lambda: {"bad": lambda: None}  # type: ignore[assignment, dict-item, return-value]
    with AsyncCheckpointEngine(tmp_path, **SMALL) as engine:
        with pytest.raises(TypeError):
            save_accelerator_state(job.accelerator, engine, "a")
        del job.counter.state_dict
        save_accelerator_state(job.accelerator, engine, "a").result(60)
        named = Job(project_config=ProjectConfiguration(str(tmp_path / "p"), automatic_checkpoint_naming=True))
        with pytest.raises(ConfigError, match="automatic_checkpoint_naming"):
            save_accelerator_state(named.accelerator, engine, "b")
        assert engine.tags() == ["a"]


class Held(torch.optim.SGD):
    """Stops in the middle of a step while `gate` is clear."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.begun.set()
        assert self.gate.wait(60)
        super().step()


def scaled_step(net: torch.nn.Module, optimizer: AcceleratedOptimizer) -> None:
    optimizer.scaler.scale(net(torch.ones(2, 64)).sum()).backward()
    optimizer.step()


@pytest.mark.parametrize("given", ["wrapper", "inner"])
def test_a_gradient_scaler_steps_behind_the_guard(tmp_path: Path, given: str) -> None:
    """Accelerate's wrapper puts `step` back as it was when it was prepared, after each step that a scaler makes."""
    Accelerator(cpu=True)
    net = torch.nn.Linear(64, 64)
    inner = Held(net.parameters(), lr=0.1)
    optimizer = AcceleratedOptimizer(inner, scaler=torch.amp.GradScaler("cpu"))
    with AsyncCheckpointEngine(tmp_path, **SMALL, backpressure_timeout_s=0.5) as engine:
        engine.guard(optimizer if given == "wrapper" else inner)
        for tag in ("a", "b"):
            engine.create(tag)
            engine.save(net.state_dict(), "x.pt")
            before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
            pending = engine.commit(tag)
            scaled_step(net, optimizer)
            pending.result(60)
            assert pending.metrics.saves[0].mode == "lazy"
            assert all(torch.equal(before[name], tensor) for name, tensor in engine.load(f"{tag}/x.pt").items())
        if given == "wrapper":
            engine.create("c")
            inner.begun.clear()
            inner.gate.clear()
            stepping = threading.Thread(target=scaled_step, args=(net, optimizer))
            stepping.start()
            assert inner.begun.wait(60)
            with pytest.raises(BackpressureTimeout, match="a save of a guarded optimizer waited"):
                engine.save(net.state_dict(), "x.pt")
            inner.gate.set()
            stepping.join()
            engine.abort("c")


def make_roots(root: Path) -> None:
    """Each rank is a node with a root of its own: "a" and "b" on both, "c" on rank 0 alone."""
    for rank in range(2):
        with AsyncCheckpointEngine(root / str(rank), **SMALL) as engine:
            for tag in ("a", "b", "c")[: 3 - rank]:
                engine.create(tag)
                engine.save({"x": torch.ones(10)}, "x.pt")
                engine.commit(tag).result(60)


def test_all_ranks_load_the_same_checkpoint_or_raise_alike(tmp_path: Path) -> None:
    make_roots(tmp_path)
    assert run_ranks(tmp_path / "p", 2, load_from_own_root, str(tmp_path), None) == ["b", "b"]
    raw = bytearray((tmp_path / "1/b/x.pt").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "1/b/x.pt").write_bytes(raw)
    assert run_ranks(tmp_path / "p", 2, load_from_own_root, str(tmp_path), None) == ["a", "a"]
    found = run_ranks(tmp_path / "p", 2, load_from_own_root, str(tmp_path), "b")
    assert found == ["RankFailedError 1", "CorruptCheckpointError None"]
    assert run_ranks(tmp_path / "p", 2, load_from_own_root, str(tmp_path), "c")[0] == "RankFailedError 1"


def test_a_commit_that_failed_on_one_rank_raises_on_all(tmp_path: Path) -> None:
    make_roots(tmp_path)
    found = run_ranks(tmp_path / "p", 2, load_with_a_lost_commit, str(tmp_path))
    assert found == ["RankFailedError 1", "CommitError None"]


def test_trainers_on_nodes_of_their_own_resume_alike(tmp_path: Path) -> None:
    make_roots(tmp_path)
    for rank in range(2):
        for number, tag in enumerate("abc"[: 3 - rank]):
            (tmp_path / f"{rank}/{tag}").rename(tmp_path / f"{rank}/checkpoint-{number}")
    assert run_ranks(tmp_path / "p", 2, resume_from_own_root, str(tmp_path)) == ["checkpoint-1"] * 2
    (tmp_path / "0/checkpoint-1/x.pt").write_bytes(b"")
    found = run_ranks(tmp_path / "p", 2, resume_from_own_root, str(tmp_path))
    assert found == ["CorruptCheckpointError None", "RankFailedError 0"]
    shutil.rmtree(tmp_path / "1")
    assert run_ranks(tmp_path / "p", 2, resume_from_own_root, str(tmp_path)) == ["CheckpointNotFoundError None"] * 2
    shutil.rmtree(tmp_path / "0")
    assert run_ranks(tmp_path / "p", 2, resume_from_own_root, str(tmp_path)) == ["True"] * 2


def test_a_stock_checkpoint_on_one_node_alone_is_adopted_or_refused_by_all(tmp_path: Path) -> None:
    stock = tmp_path / "1" / "checkpoint-4"
    stock.mkdir(parents=True)
    found = run_ranks(tmp_path / "p", 2, adopt_in_own_root, str(tmp_path))
    assert found == ["RankFailedError 1", "ConfigError None"]
    (stock / "trainer_state.json").write_text("{}")
    assert run_ranks(tmp_path / "p", 2, adopt_in_own_root, str(tmp_path)) == ["None", "None"]
    assert (stock / "manifest.json").exists()


def test_files_that_others_have_added_do_no_harm(tmp_path: Path) -> None:
    job = Job()
    with AsyncCheckpointEngine(tmp_path, **SMALL) as engine:
        save_accelerator_state(job.accelerator, engine, "a").result(60)
        (tmp_path / "a/eval_results.json").write_text("{}")
        assert (
            load_accelerator_state(job.accelerator, engine)
            == load_accelerator_state(job.accelerator, engine, "a")
            == "a"
        )
