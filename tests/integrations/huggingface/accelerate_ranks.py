"""What the ranks of the Accelerate tests do; each function runs in its own process, with a gloo group around it."""

from __future__ import annotations

import os
from typing import Any

import torch.distributed as dist

from async_ckpt.errors import CheckpointError
from async_ckpt.integrations.huggingface import load_accelerator_state


def load_from_own_root(rank: int, root: str, tag: str | None) -> str:
    """The tag that this rank has loaded from `<root>/<rank>`, or the error's name and whom it blames."""
    here = {
        "RANK": str(rank),
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(dist.get_world_size()),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    os.environ.update(here)
    from accelerate import Accelerator

    accelerator: Any = Accelerator(cpu=True)
    accelerator.load_state = lambda path, **options: None
    try:
        return load_accelerator_state(accelerator, f"{root}/{rank}", tag)
    except CheckpointError as error:
        return f"{type(error).__name__} {getattr(error, 'rank', None)}"
