"""What the harness asks of every checkpoint writer, and how it makes the others' bytes durable.

Guarantees:
- Time is taken by the harness alone; a contender only acts.
- `save` may be called again at once: a contender that allows one save in flight waits inside `save` for the last one
  (that is its stall).
"""

from __future__ import annotations

import abc
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.workloads import State, Workload
from tests.support.processes import free_port

Syncs = Literal["nothing", "files", "all"]


class Unavailable(Exception):
    """This contender cannot run here; the message is its row."""


class Contender(abc.ABC):
    """One checkpoint writer in one configuration. Used from one thread, for one directory, then closed."""

    config: str = ""
    """The configuration in words: what a reader needs to repeat it."""
    syncs: Syncs = "nothing"
    """What the contender itself has synced when it reports a save as finished: nothing, its files, or files and
    directories.
    """

    def setup(self, directory: Path, workload: Workload) -> None:
        """Know where and what to save, and `start`. Timed as the start, not as a save."""
        self.directory = directory
        self.workload = workload
        self.pending: Any = None
        """What the last save can be waited for by, where it is asynchronous: a future."""
        self.start()

    def start(self) -> None:
        """Start engines, allocate."""
        return

    def prewarm(self) -> None:
        """Whatever the contender offers to make its first save a warm one. Timed on its own."""
        return

    @abc.abstractmethod
    def save(self, step: int, state: State) -> None:
        """Save `state`; returns when training may go on (see `wait_safe`). Its duration is the stall."""

    def wait_safe(self) -> None:
        """Block until the saved tensors may be changed; `save` has copied or written them, unless said otherwise."""
        return

    def before_step(self) -> None:
        """Called before `optimizer.step()` in a training loop; whoever hooks the optimizer itself need not wait."""
        self.wait_safe()

    def wait_durable(self) -> None:
        """Block until the contender itself reports the last save as finished."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None

    def produced(self, step: int) -> Path:
        """The file or directory that holds the checkpoint of `step`."""
        return self.directory / f"step-{step}"

    def discard(self, step: int) -> None:
        """Delete the checkpoint of `step` (not timed)."""
        path = self.produced(step)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def detail(self) -> dict[str, Any]:
        """What the contender says about its own last save, as JSON (stages, bytes, modes)."""
        return {}

    def close(self) -> None:
        """Stop threads and processes."""
        self.wait_durable()

    @property
    def synced_by(self) -> str:
        """Who made the bytes durable, in the words of the tables."""
        words = {"nothing": "harness", "files": "contender (files), harness (directories)", "all": "contender"}
        return words[self.syncs]


def fsync_path(path: Path) -> None:
    """Sync one file or directory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """Sync every file below `path`, every directory bottom-up, and the parent: what a power cut must find."""
    if path.is_dir():
        for folder, _, files in os.walk(path, topdown=False):
            for name in files:
                fsync_path(Path(folder) / name)
            fsync_path(Path(folder))
    else:
        fsync_path(path)
    fsync_path(path.parent)


def tree_bytes(path: Path) -> int:
    """Bytes of file contents at or below `path`."""
    if path.is_dir():
        return sum(entry.stat().st_size for entry in path.rglob("*") if entry.is_file())
    return path.stat().st_size


def clone_tree(value: Any) -> Any:
    """A deep copy in which every tensor is a fresh clone: what people write by hand."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: clone_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(clone_tree(item) for item in value)
    return value


def single_rank_environment() -> None:
    """The variables that launchers set, for one rank; some contenders refuse to start without them."""
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK", "CROSS_RANK"), "0")
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE"), "1")
    for key, value in {"MASTER_ADDR": "127.0.0.1", **ranks, **sizes}.items():
        os.environ.setdefault(key, value)


def init_single_rank_group() -> None:
    """A gloo group of one rank on a free port, for contenders that cannot do without one."""
    from torch import distributed

    single_rank_environment()
    if distributed.is_initialized():
        return
    os.environ["MASTER_PORT"] = str(free_port())
    distributed.init_process_group("gloo", rank=0, world_size=1)
