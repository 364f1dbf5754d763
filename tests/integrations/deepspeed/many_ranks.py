"""Scenarios for two ranks, each against real DeepSpeed. A scenario is right when it returns on both."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils import groups
from torch import distributed

from async_ckpt import Catalog, CheckpointError, CommitError, Observer, OutOfSpaceError, RankFailedError, Tolerate
from async_ckpt.integrations.deepspeed import AsyncDeepSpeedEngine, attach
from async_ckpt.metrics import SaveMetrics
from tests.integrations.deepspeed.one_rank import KEPT, SMALL, load_stock
from tests.integrations.deepspeed.world import (
    GatedFileSystem,
    differences,
    make,
    make_pipeline,
    state_of,
    train,
    train_pipeline,
)
from tests.support.faulty_filesystem import FaultyFileSystem

RANK = int(os.environ["RANK"])
PATIENCE_S = 120.0


class Durable(Observer):
    """Counts files of this rank that are on disk."""

    def __init__(self, num_files: int) -> None:
        self.left = num_files
        self.reached = threading.Event()

    def on_save(self, metrics: SaveMetrics) -> None:
        self.left -= 1
        if self.left == 0:
            self.reached.set()


def agree(value: int) -> None:
    """Assert that all ranks have the same value."""
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    assert len(set(values)) == 1, f"the ranks differ: {values}"


def saved_state(engine: Any) -> dict[str, Any]:
    """What a checkpoint of now gives back to this rank: up to ZeRO-2, DeepSpeed saves the buffers of rank 0 alone."""
    state = state_of(engine)
    if engine.zero_optimization_stage() < 3:
        buffers = [state["buffers"]]
        distributed.broadcast_object_list(buffers, src=0)
        state["buffers"] = buffers[0]
    return state


def answers_of(checkpointer: AsyncDeepSpeedEngine) -> list[Any]:
    """What `get_commit_info` answers from now on, in order."""
    answers: list[Any] = []
    ask = checkpointer.get_commit_info

    def noting() -> Any:
        answers.append("failed")
        answers[-1] = ask()
        return answers[-1]

    checkpointer.get_commit_info = noting  # type: ignore[method-assign]
    return answers


def ranks_roundtrip(directory: Path, stage: str, dtype: str) -> None:
    filesystem = GatedFileSystem()
    engine = make(int(stage), dtype)
    attach(engine, directory, filesystem=filesystem, **SMALL)
    train(engine, 2, seed=RANK)
    expected = saved_state(engine)
    engine.save_checkpoint(str(directory), client_state={"epoch": 7})
    train(engine, 3, seed=RANK)
    assert not (directory / "latest").exists() and not (directory / "global_step2").exists()
    assert differences(expected, saved_state(engine))
    filesystem.gate.set()
    engine.destroy()
    assert (directory / "latest").read_text() == "global_step2"
    stock, found = load_stock(directory, int(stage), dtype)
    assert found["epoch"] == 7
    assert differences(expected, state_of(stock)) == []
    again = make(int(stage), dtype, seed=5)
    attach(again, directory, **SMALL)
    path, _ = again.load_checkpoint(str(directory))
    assert path is not None
    assert differences(expected, state_of(again)) == []
    again.destroy()
    assert Catalog(directory).verify("global_step2").ok


def slow_rank(directory: Path) -> None:
    """`latest` waits for the slowest rank, training for none; both ranks hear of the commit at the same step."""
    filesystem, durable = GatedFileSystem(is_open=RANK == 0), Durable(2)
    engine = make(2)
    checkpointer = attach(engine, directory, filesystem=filesystem, observers=(durable,), **SMALL)
    answers = answers_of(checkpointer)
    train(engine, 1, seed=RANK)
    expected = saved_state(engine)
    engine.save_checkpoint(str(directory))
    train(engine, 10, seed=RANK)
    if RANK == 0:
        assert durable.reached.wait(60), "rank 0's own files were not written"
    distributed.barrier()
    assert not (directory / "latest").exists() and not (directory / "global_step1").exists()
    assert set(answers) == {None}
    distributed.barrier()
    filesystem.gate.set()
    steps_until_answered(engine, answers)
    agree(len(answers))
    assert answers[-1].tag == "global_step1" and answers[-1].save_latest is False
    assert (directory / "latest").read_text() == "global_step1"
    engine.destroy()
    assert differences(expected, state_of(load_stock(directory, 2, "fp32")[0])) == []


def tags_of_their_own(directory: Path) -> None:
    """Ranks that save under different tags each get what stock DeepSpeed leaves; then all share one again."""
    engine = make(2)
    attach(engine, directory, rank_timeout_s=30.0, **SMALL)
    train(engine, 1, seed=RANK)
    engine.save_checkpoint(str(directory), tag=f"of-rank-{RANK}")
    train(engine, 1, seed=RANK)
    engine.save_checkpoint(str(directory), tag=f"nested/{RANK}/x", save_latest=False)
    engine.checkpoint_engine.drain()
    distributed.barrier()
    stock = directory / "stock"
    other = make(2)
    train(other, 1, seed=RANK)
    other.save_checkpoint(str(stock), tag=f"of-rank-{RANK}")
    distributed.barrier()
    assert (directory / "latest").read_text() == (stock / "latest").read_text() == "of-rank-0"
    for rank in range(2):
        names = {p.name for p in (directory / f"of-rank-{rank}").iterdir()}
        assert names == {p.name for p in (stock / f"of-rank-{rank}").iterdir()} | {"manifest.json"}
        assert Catalog(directory).verify(f"of-rank-{rank}").ok
        assert Catalog(directory / "nested" / str(rank)).verify("x").ok
    expected = saved_state(engine)
    engine.save_checkpoint(str(directory), tag="shared")
    engine.destroy()
    assert (directory / "latest").read_text() == "shared"
    assert differences(expected, state_of(load_stock(directory, 2, "fp32")[0])) == []


def steps_until_answered(engine: Any, answers: list[Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        train(engine, 1, seed=RANK)
        if answers[-1] is not None:
            return
    raise AssertionError(f"no answer within {PATIENCE_S:g} s")


def failing_rank(directory: Path) -> None:
    """One rank's disk is full: both raise at the same step, nothing is visible, the next checkpoint works."""
    filesystem = GatedFileSystem(is_open=True)
    engine = make(2)
    checkpointer = attach(engine, directory, filesystem=filesystem, **SMALL)
    train(engine, 1, seed=RANK)
    engine.save_checkpoint(str(directory), tag="good")
    checkpointer.drain()
    train(engine, 1, seed=RANK)
    answers = answers_of(checkpointer)
    if RANK == 1:
        filesystem.error = OutOfSpaceError("no room on this rank")
    engine.save_checkpoint(str(directory), tag="bad")
    with pytest.raises(OutOfSpaceError if RANK == 1 else RankFailedError, match="no room on this rank") as caught:
        steps_until_answered(engine, answers)
    agree(len(answers))
    assert isinstance(caught.value, OutOfSpaceError) or getattr(caught.value, "rank", None) == 1
    assert (directory / "latest").read_text() == "good" and Catalog(directory).tags() == ["good"]
    distributed.barrier()
    filesystem.error = None
    expected = saved_state(engine)
    engine.save_checkpoint(str(directory), tag="next")
    engine.destroy()
    assert (directory / "latest").read_text() == "next"
    assert differences(expected, state_of(load_stock(directory, 2, "fp32")[0])) == []


def ranks_tolerated(directory: Path) -> None:
    """Of the failures of one rank's disk, the second in a row raises on both; before it, both go on."""
    filesystem = FaultyFileSystem()
    if RANK == 1:
        filesystem.fail_when(lambda op: op.name == "fsync" and ".bad" in op.path and not op.is_dir, errno.EIO)
    engine = make(2)
    tolerate = Tolerate(consecutive=2)
    checkpointer = attach(engine, directory, filesystem=filesystem, on_commit_failure=tolerate, **SMALL)
    for tag in ("bad1", "good", "bad2", "bad3"):
        train(engine, 1, seed=RANK)
        engine.save_checkpoint(str(directory), tag=tag)
        if tag != "bad3":
            checkpointer.drain()
    with pytest.raises(CommitError, match=r"2 checkpoints in a row.*'bad2'.*'bad3'"):
        checkpointer.drain()
    assert (directory / "latest").read_text() == "good" and Catalog(directory).tags() == ["good"]
    engine.destroy()


def bad_state_on_one_rank(directory: Path) -> None:
    """What only one rank cannot save leaves no rank behind at DeepSpeed's barriers; all raise it at the same call."""
    engine = make(3)
    checkpointer = attach(engine, directory, **SMALL)
    train(engine, 1, seed=RANK)
    answers = answers_of(checkpointer)
    engine.save_checkpoint(str(directory), tag="bad", client_state={"bad": lambda: None} if RANK == 1 else {})
    with pytest.raises(CheckpointError, match=r"\['bad'\] \(function\) cannot be saved") as caught:
        steps_until_answered(engine, answers)
    agree(len(answers))
    assert isinstance(caught.value, RankFailedError) == (RANK == 0)
    assert Catalog(directory).tags() == [] and not (directory / "latest").exists()
    for _ in range(3):
        train(engine, 1, seed=RANK)
    expected = saved_state(engine)
    engine.save_checkpoint(str(directory), tag="next")
    engine.destroy()
    assert (directory / "latest").read_text() == "next"
    assert differences(expected, state_of(load_stock(directory, 3, "fp32")[0])) == []


def ranks_same_tag(directory: Path) -> None:
    """Saved three times without waiting, and below another root in between."""
    engine = make(1)
    attach(engine, directory, **SMALL)
    for number in range(3):
        train(engine, 1, seed=RANK)
        engine.save_checkpoint(str(directory), tag="best")
        engine.save_checkpoint(str(directory), tag=f"epoch{number}/last", save_latest=False)
    expected = saved_state(engine)
    assert engine.save_16bit_model(str(directory)) is True
    path, _ = engine.load_checkpoint(str(directory))
    assert path is not None and "best" in path
    engine.destroy()
    for tag in ("best", "epoch2/last"):
        assert differences(expected, state_of(load_stock(directory, 1, "fp32", tag=tag)[0])) == []
    assert torch.load(directory / "pytorch_model.bin", weights_only=True).keys() >= expected["model"].keys()


def ranks_folder_that_cannot_be_replaced(directory: Path) -> None:
    """Only rank 0 looks at another tool's folder; what it cannot read there fails the save on both alike."""
    stock = make(2)
    train(stock, 1, seed=RANK)
    stock.save_checkpoint(str(directory), tag="t")
    if RANK == 0:
        (directory / "t" / "link").symlink_to("nowhere")
    distributed.barrier()
    engine = make(2, seed=3)
    checkpointer = attach(engine, directory, **SMALL)
    answers = answers_of(checkpointer)
    engine.save_checkpoint(str(directory), tag="t")
    with pytest.raises(CheckpointError, match="written by another tool and cannot be replaced") as caught:
        steps_until_answered(engine, answers)
    agree(len(answers))
    assert isinstance(caught.value, RankFailedError) == (RANK == 1)
    distributed.barrier()
    if RANK == 0:
        (directory / "t" / "link").unlink()
    distributed.barrier()
    # The same tag again: no rank takes the failure that is past for that of this save.
    expected = saved_state(engine)
    engine.save_checkpoint(str(directory), tag="t")
    engine.destroy()
    assert (directory / "latest").read_text() == "t" and Catalog(directory).verify("t").ok
    assert differences(expected, state_of(load_stock(directory, 2, "fp32")[0])) == []


def ranks_pipeline(directory: Path) -> None:
    """Two stages, one on each rank; step() is never called."""
    engine = make_pipeline(num_stages=2)
    checkpointer = attach(engine, directory, **SMALL)
    train_pipeline(engine, 2)
    expected = state_of(engine)
    engine.save_checkpoint(str(directory))
    train_pipeline(engine, 2)
    for pending in checkpointer.pending():
        assert pending.result(60)
    assert (directory / "latest").read_text() == "global_step2"
    path, _ = engine.load_checkpoint(str(directory))
    assert path is not None
    assert differences(expected, state_of(engine)) == []
    engine.save_checkpoint(str(directory), tag="again")
    engine.destroy()
    assert (directory / "latest").read_text() == "again"
    # A pipeline's grid stays behind as the process's model parallel unit, and no other engine could be made.
    groups.mpu = None


def ranks_node_local(directory: Path) -> None:
    """DeepSpeed's node-local mode, as if each rank were a node with a disk of its own: all of them commit, or none."""
    own = directory / f"node{RANK}"
    launched = {"CROSS_RANK": str(RANK), "CROSS_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    filesystem = GatedFileSystem(is_open=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in launched.items():
            patch.setenv(name, value)
        engine = make(1, checkpoint={"use_node_local_storage": True})
        checkpointer = attach(engine, own, filesystem=filesystem, **SMALL)
    train(engine, 1, seed=RANK)
    expected = state_of(engine)
    engine.save_checkpoint(str(own))
    checkpointer.drain()
    assert (own / "latest").read_text() == "global_step1" and Catalog(own).verify("global_step1").ok
    train(engine, 1, seed=RANK)
    if RANK == 1:
        filesystem.error = OutOfSpaceError("no room on this node")
    engine.save_checkpoint(str(own))
    with pytest.raises(OutOfSpaceError if RANK == 1 else RankFailedError, match="no room on this node"):
        engine.load_checkpoint(str(own))
    path, _ = engine.load_checkpoint(str(own))
    assert path is not None and "global_step1" in path
    assert differences(expected, state_of(engine)) == []
    engine.destroy()


def ranks_saved_for_exit(directory: Path) -> None:
    """Save, and let both processes end at once."""
    engine = make(2)
    attach(engine, directory.parent / "exit", **SMALL)
    train(engine, 1, seed=RANK)
    torch.save(saved_state(engine), directory.parent / f"expected-{RANK}.pt")
    engine.save_checkpoint(str(directory.parent / "exit"))
    KEPT.append(engine)


def ranks_loaded_after_exit(directory: Path) -> None:
    expected = torch.load(directory.parent / f"expected-{RANK}.pt", weights_only=False)
    assert (directory.parent / "exit" / "latest").read_text() == "global_step1"
    engine, _ = load_stock(directory.parent / "exit", 2, "fp32")
    assert differences(expected, state_of(engine)) == []


def killed_rank(directory: Path) -> None:
    """Rank 1 dies while its files are held back."""
    engine = make(2)
    attach(engine, directory, **SMALL)
    train(engine, 1, seed=RANK)
    engine.save_checkpoint(str(directory), tag="good")
    engine.destroy()
    filesystem = GatedFileSystem(is_open=RANK == 0)
    engine = make(2)
    checkpointer = attach(engine, directory, filesystem=filesystem, rank_timeout_s=5.0, **SMALL)
    engine.save_checkpoint(str(directory), tag="bad")
    store = distributed.distributed_c10d._get_default_store()
    if RANK == 1:
        # Not before rank 0 has left DeepSpeed's last barrier.
        store.wait(["saved"])
        os.kill(os.getpid(), signal.SIGKILL)
    store.set("saved", "yes")
    with pytest.raises(RankFailedError, match="rank 1"):
        checkpointer.drain()
    assert (directory / "latest").read_text() == "good" and Catalog(directory).tags() == ["good"]
    checkpointer.cleanup()
