"""What the ranks of the Accelerate and Trainer tests do, each a node with a root of its own.

Each function runs in its own process, with a gloo group around it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.errors import CheckpointError
from async_ckpt.integrations.huggingface import load_accelerator_state
from async_ckpt.integrations.huggingface.resume import adopt_ahead, resume_point
from tests.support.faulty_filesystem import FaultyFileSystem


def _environment(rank: int) -> None:
    here = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    os.environ.update(here)


def load_from_own_root(rank: int, root: str, tag: str | None) -> str:
    """The tag that this rank has loaded from `<root>/<rank>`, or the error's name and whom it blames."""
    _environment(rank)
    from accelerate import Accelerator

    accelerator: Any = Accelerator(cpu=True)
    accelerator.load_state = lambda path, **options: None
    return _told(lambda: load_accelerator_state(accelerator, f"{root}/{rank}", tag))


def load_with_a_lost_commit(rank: int, root: str) -> str:
    """As above, through an engine whose newest commit fails on rank 1 alone."""
    _environment(rank)
    from accelerate import Accelerator

    accelerator: Any = Accelerator(cpu=True)
    accelerator.load_state = lambda path, **options: None
    files = FaultyFileSystem()
    with AsyncCheckpointEngine(f"{root}/{rank}", staging_bytes=1 << 20, filesystem=files) as engine:
        if rank == 1:
            files.fail_when(lambda op: op.name == "fsync", errno.EIO)
        engine.create("d")
        pending = engine.commit("d")
        told = _told(lambda: load_accelerator_state(accelerator, engine))
        pending.exception()
    return told


def resume_from_own_root(rank: int, root: str) -> str:
    """The name that `Trainer` resumes from on this rank, whose output directory is `<root>/<rank>`, or the error."""
    return _told(lambda: os.path.basename(str(resume_point(True, _arguments(rank, root)))))


def adopt_in_own_root(rank: int, root: str) -> str:
    """What a run of 10 steps says of stock checkpoints in `<root>/<rank>`."""
    args = _arguments(rank, root)
    return _told(lambda: str(adopt_ahead(args.output_dir, 0, 10, adopts=True)))


def _arguments(rank: int, root: str) -> Any:
    _environment(rank)
    from transformers import TrainingArguments

    return TrainingArguments(f"{root}/{rank}", use_cpu=True, save_on_each_node=True, report_to=[])


def _told(work: Callable[[], str]) -> str:
    try:
        return work()
    except CheckpointError as error:
        return f"{type(error).__name__} {getattr(error, 'rank', None)}"
