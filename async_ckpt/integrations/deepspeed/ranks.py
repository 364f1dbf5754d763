"""This process's place among DeepSpeed's ranks, and the store they share."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import distributed

from ...errors import ConfigError
from ...format.checksum import crc32
from ...ranks.coordinator import Coordinator, LocalCoordinator
from ...ranks.store_link import private_connection

if TYPE_CHECKING:
    from ...host.facts import Node

# Engines are made in the same order on every rank, so the same number means the same engine.
_numbers = itertools.count()


@dataclass(frozen=True)
class Ranks:
    """`store` is None for a single process; `node` is set where each node has a save_dir of its own."""

    rank: int = 0
    world_size: int = 1
    store: Any = None
    node: Node | None = None

    @classmethod
    def current(cls, *, node_local: bool = False) -> Ranks:
        """From the default process group; a single process where there is none."""
        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return cls()
        # Imported here: both are missing from a torch that was built without distributed.
        from torch.distributed import PrefixStore
        from torch.distributed.distributed_c10d import _get_default_store

        rank, world_size = distributed.get_rank(), distributed.get_world_size()
        store = PrefixStore(f"async_ckpt/deepspeed/{next(_numbers)}", private_connection(_get_default_store()))
        return cls(rank, world_size, store, _this_node(rank, world_size) if node_local else None)

    @property
    def folder_name(self) -> str:
        """DeepSpeed's name for the folder of this rank's offloaded tensors."""
        number = self.rank if self.node is None else self.node.ranks.index(self.rank)
        return f"rank{number:02d}"

    def coordinator(self, ranks: tuple[int, ...], timeout_s: float) -> Coordinator:
        """A coordinator for the checkpoints of these ranks, this one among them.

        Raises:
            ConfigError: some ranks, but not all, share a tag, and each node has a save_dir of its own.
        """
        if self.store is None or len(ranks) == 1:
            return LocalCoordinator()
        node = self.node
        if len(ranks) < self.world_size and node is not None:
            raise ConfigError(
                f"ranks {ranks} save under a tag of their own; with use_node_local_storage all ranks must have the same"
            )
        from ...ranks.rank_coordinator import RankCoordinator

        # Engines are numbered anew in every run, and DeepSpeed's store lives no longer than one.
        channel = "all" if len(ranks) == self.world_size else f"{crc32(repr(ranks).encode()):08x}"
        mine, size = ranks.index(self.rank), len(ranks)
        return RankCoordinator(
            self.store, mine, size, timeout_s=timeout_s, node=node, run_id="deepspeed", channel=channel
        )


def _this_node(rank: int, world_size: int) -> Node:
    """From the variables of DeepSpeed's launcher, or torchrun's: both deal ranks node by node."""
    from ...host.facts import Node

    local_rank = _number("LOCAL_RANK")
    first = rank - local_rank
    last = min(first + _number("LOCAL_SIZE", "LOCAL_WORLD_SIZE"), world_size)
    return Node(
        _number("CROSS_RANK", "GROUP_RANK"), _number("CROSS_SIZE", "GROUP_WORLD_SIZE"), tuple(range(first, last))
    )


def _number(*names: str) -> int:
    for name in names:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    raise ConfigError(f"use_node_local_storage needs a launcher's variables: {' or '.join(names)} is not a number")
