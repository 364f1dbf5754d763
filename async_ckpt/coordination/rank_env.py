"""Where a rank learns its run's name and its node's layout: torchrun's environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError


@dataclass(frozen=True)
class Node:
    """This node among those with a root of their own: its number, how many there are, and the ranks that run on it."""

    number: int
    num_nodes: int
    ranks: tuple[int, ...]


def default_run_id(store: Any) -> str:
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is not None:
        return f"{run_id}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    inner = store
    while hasattr(inner, "underlying_store"):
        inner = inner.underlying_store
    if type(inner).__name__ == "FileStore":
        raise ConfigError("a FileStore keeps the keys of earlier runs: give run_id, the same on all ranks and new in every run")
    return "run"


def node_from_env(rank: int, world_size: int) -> Node:
    """torchrun's layout: ranks are dealt node by node."""
    try:
        number, local_rank, local_size = (int(os.environ[name]) for name in ("GROUP_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        num_nodes = int(os.environ["GROUP_WORLD_SIZE"])
    except (KeyError, ValueError) as error:
        raise ConfigError(f"node_local needs torchrun's variables, or give node=Node(...): {error} is missing or no number") from error
    first = rank - local_rank
    return Node(number, num_nodes, tuple(range(first, min(first + local_size, world_size))))
