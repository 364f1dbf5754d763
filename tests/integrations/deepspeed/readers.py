"""Scenarios for one rank: who reads a checkpoint right after `save_checkpoint`. A scenario is right when it returns."""

from __future__ import annotations

import errno
import functools
import inspect
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

from async_ckpt import CheckpointError, KeepLast
from async_ckpt.integrations.deepspeed import AsyncDeepSpeedEngine, attach
from async_ckpt.retention import CheckpointInfo
from tests.integrations.deepspeed.one_rank import SMALL
from tests.integrations.deepspeed.world import GatedFileSystem, differences, make, state_of, train

MODEL_NAME = "mp_rank_00_model_states.pt"

# As data sets hold it: taken before anything was attached.
load_file = functools.partial(torch.load, weights_only=False)


class OpensGate:
    """A path that lets the files be written when somebody asks for it, and not before."""

    def __init__(self, path: Path, filesystem: GatedFileSystem) -> None:
        self._path, self._filesystem = path, filesystem

    def __fspath__(self) -> str:
        self._filesystem.gate.set()
        return str(self._path)


def ended(checkpointer: AsyncDeepSpeedEngine) -> None:
    for pending in checkpointer.pending():
        pending.wait(60)


def read_at_once(directory: Path) -> None:
    """Another attached engine, and a tool that was imported before any, find what `save_checkpoint` has left on its
    way.
    """
    filesystem = GatedFileSystem()
    engine = make(2, "fp32")
    checkpointer = attach(engine, directory, filesystem=filesystem, reuse="off", **SMALL)
    train(engine, 1)
    engine.save_checkpoint(str(directory))
    assert not (directory / "latest").exists()
    threading.Timer(0.2, filesystem.gate.set).start()
    weights = get_fp32_state_dict_from_zero_checkpoint(str(directory))
    assert all(torch.equal(weights[name], value.float()) for name, value in engine.module.named_parameters())
    train(engine, 1)
    expected = state_of(engine)
    other = make(2, "fp32", seed=3)
    attach(other, directory, **SMALL)
    filesystem.gate.clear()
    engine.save_checkpoint(str(directory), tag="second")
    threading.Timer(0.2, filesystem.gate.set).start()
    path, _ = other.load_checkpoint(str(directory))
    assert path is not None and "second" in path
    assert differences(expected, state_of(other)) == []
    other.destroy()
    # A failure is told to the reader, and to its own engine as well.
    filesystem.error = OSError(errno.EIO, "no")
    filesystem.gate.clear()
    engine.save_checkpoint(str(directory), tag="t9")
    filesystem.gate.set()
    ended(checkpointer)
    with pytest.raises(CheckpointError):
        get_fp32_state_dict_from_zero_checkpoint(str(directory))
    assert get_fp32_state_dict_from_zero_checkpoint(str(directory)), "told once"
    other = make(2, seed=3)
    attach(other, directory, **SMALL)
    with pytest.raises(CheckpointError):
        other.load_checkpoint(str(directory))
    path, _ = other.load_checkpoint(str(directory))
    assert path is not None and "second" in path
    other.destroy()
    with pytest.raises(CheckpointError):
        engine.destroy()


def torch_load_at_once(directory: Path) -> None:
    """A plain `torch.load` of a path in a checkpoint that is on its way waits for it, under any name of the folder;
    other files, and a forked child, are not held up. The function stays the one that it was.
    """
    filesystem = GatedFileSystem()
    signature = inspect.signature(torch.load)
    engine = make(1)
    checkpointer = attach(engine, filesystem=filesystem, **SMALL)
    train(engine, 1)
    names = {name for name, _ in engine.module.named_parameters()}
    torch.save({"x": 1}, directory / "other.pt")
    (directory / "link").symlink_to("runs")
    (directory / "to-come.pt").symlink_to(f"runs/d/{MODEL_NAME}")
    os.chdir(directory)
    runs = directory / "runs"
    for tag, path in (
        ("a", runs / "a" / MODEL_NAME),
        ("nested/b", runs / "nested" / "b" / MODEL_NAME),
        ("c", Path("link") / ".." / "runs" / "c" / MODEL_NAME),
        ("d", directory / "to-come.pt"),
        ("a", directory / "link" / "a" / MODEL_NAME),
    ):
        filesystem.gate.clear()
        train(engine, 1)
        engine.save_checkpoint(runs, tag=tag, exclude_frozen_parameters=True)
        assert torch.load(directory / "other.pt") == {"x": 1}
        with pytest.raises(FileNotFoundError):
            torch.load(runs / "of-another-tag" / MODEL_NAME)
        if tag != "a":
            assert exit_code_of_child(path) == 7
        assert not filesystem.gate.is_set()
        state = load_file(OpensGate(path, filesystem))
        assert state["global_steps"] == engine.global_steps and names <= state["module"].keys()
    ended(checkpointer)
    # Nobody need resolve a path any more.
    with pytest.raises(FileNotFoundError):
        torch.load(OpensGate(directory / "none", filesystem))
    assert pickle.loads(pickle.dumps(load_file)).func is torch.load and inspect.signature(torch.load) == signature
    opener = torch.serialization._open_file_like
    attach(make(1), **SMALL).cleanup()
    assert torch.serialization._open_file_like is opener, "attach again wraps nothing again"
    engine.destroy()


def exit_code_of_child(path: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            torch.load(path)
        except FileNotFoundError:
            os._exit(7)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def torch_load_of_a_failure(directory: Path) -> None:
    """What has failed, before or while somebody reads it, is raised to the first reader, and by its engine too; a later
    save under the tag counts alone.
    """
    filesystem = GatedFileSystem()
    engine = make(1)
    checkpointer = attach(engine, directory, filesystem=filesystem, reuse="off", **SMALL)
    for tag in ("while", "before"):
        train(engine, 1)
        filesystem.gate.clear()
        filesystem.error = OSError(errno.EIO, "no")
        engine.save_checkpoint(str(directory), tag=tag)
        path = directory / tag / MODEL_NAME
        if tag == "before":
            filesystem.gate.set()
            ended(checkpointer)
        with pytest.raises(CheckpointError):
            load_file(OpensGate(path, filesystem))
        with pytest.raises(FileNotFoundError):
            load_file(path)
        with pytest.raises(CheckpointError):
            checkpointer.drain()
        filesystem.error = None
        train(engine, 1)
        engine.save_checkpoint(str(directory), tag=tag)
        assert load_file(path)["global_steps"] == engine.global_steps
    engine.destroy()


class Looks(KeepLast):
    """A policy that reads what it decides about."""

    def __init__(self, directory: Path) -> None:
        super().__init__(1)
        self._directory = directory
        self.steps: list[int] = []

    def kept(self, checkpoints: Any, now_unix_ns: int) -> dict[str, str]:
        newest: CheckpointInfo = max(checkpoints, key=lambda info: info.created_unix_ns)
        self.steps.append(load_file(self._directory / newest.tag / MODEL_NAME)["global_steps"])
        return super().kept(checkpoints, now_unix_ns)


def torch_load_behind_a_commit(directory: Path) -> None:
    """What a commit itself calls, the user's retention say, waits for no commit."""
    engine = make(1)
    looks = Looks(directory)
    attach(engine, directory, retention=looks, **SMALL)
    train(engine, 1)
    engine.save_checkpoint(str(directory), tag="a")
    engine.destroy()
    assert looks.steps == [1]


def without_overlap(directory: Path) -> None:
    """With overlap=False everything is there right after the save, for whatever looks at it."""
    engine = make(1)
    attach(engine, directory, overlap=False, **SMALL)
    train(engine, 1)
    engine.save_checkpoint(str(directory), tag="u", exclude_frozen_parameters=True)
    names = {name for name, _ in engine.module.named_parameters()}
    with open(directory / "u" / MODEL_NAME, "rb") as file:
        assert names <= torch.load(file, weights_only=False)["module"].keys()
    assert (directory / "latest").read_text() == "u"
    engine.destroy()
