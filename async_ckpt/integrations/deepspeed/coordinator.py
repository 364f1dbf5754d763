"""Which ranks commit together: those that share a tag, nearly always all of them."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from typing import Any

from torch import distributed

from ...errors import ConfigError
from ...format.checksum import crc32
from ...format.manifest import Manifest
from ...host.facts import Node, node_from_env
from ...ranks.coordinator import Coordinator, LocalCoordinator
from ...ranks.rank_coordinator import RankCoordinator
from ...storage.filesystem import FileSystem
from ...storage.staged import Destination, Staging
from .destination import DeepSpeedDestination

# Rank 0 often holds the store: it must not leave before the others have heard how their checkpoints ended.
_LINGER_S = 60.0

# Engines are made in the same order on every rank, so the same number means the same engine.
_numbers = itertools.count()


class DeepSpeedCoordinator:
    """Hands each checkpoint to the coordinator of the ranks that save under its tag, whatever its save_dir."""

    def __init__(self, filesystem: FileSystem, timeout_s: float, *, node_local: bool) -> None:
        """Rank and store come from the default process group; without one this is a single process.

        Raises:
            ConfigError: `node_local`, and no launcher's variables tell of the nodes.
        """
        self.rank, self.world_size = 0, 1
        self.node: Node | None = None
        self._store: Any = None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            # Imported here: both are missing from a torch that was built without distributed.
            from torch.distributed import PrefixStore
            from torch.distributed.distributed_c10d import _get_default_store

            self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
            self._store = PrefixStore(f"async_ckpt/deepspeed/{next(_numbers)}", _get_default_store())
            self.node = node_from_env(self.rank, self.world_size) if node_local else None
        self._filesystem = filesystem
        self._timeout_s = timeout_s
        self._by_ranks: dict[tuple[int, ...], Coordinator] = {}
        everybody = self._of(tuple(range(self.world_size)))
        self.leads = everybody.leads
        self.talk = everybody.talk if isinstance(everybody, RankCoordinator) else None
        """Asks the other ranks; None for a single process."""

    def bind(self, filesystem: FileSystem, root: str) -> None:
        return

    def begin(self, destination: Destination, overwrite: str) -> Staging:
        assert isinstance(destination, DeepSpeedDestination)
        return self._of(destination.ranks).begin(destination, overwrite)

    def admit(self, staging: Staging, path: str, manifest_bytes: int) -> Future[str]:
        assert isinstance(staging.destination, DeepSpeedDestination)
        return self._of(staging.destination.ranks).admit(staging, path, manifest_bytes)

    def publish(self, staging: Staging, part: Manifest) -> None:
        assert isinstance(staging.destination, DeepSpeedDestination)
        self._of(staging.destination.ranks).publish(staging, part)

    def abort(self, staging: Staging, error: BaseException) -> None:
        assert isinstance(staging.destination, DeepSpeedDestination)
        self._of(staging.destination.ranks).abort(staging, error)

    def sweep(self) -> None:
        # Each save_dir is swept when it is first used.
        return

    def close(self) -> None:
        for coordinator in self._by_ranks.values():
            coordinator.close()

    def _of(self, ranks: tuple[int, ...]) -> Coordinator:
        """The coordinator of these ranks, this one among them.

        Raises:
            ConfigError: some ranks, but not all, share a tag, and each node has a save_dir of its own.
        """
        if ranks not in self._by_ranks:
            made = self._by_ranks[ranks] = self._make(ranks)
            made.bind(self._filesystem, "")
        return self._by_ranks[ranks]

    def _make(self, ranks: tuple[int, ...]) -> Coordinator:
        if self._store is None or len(ranks) == 1:
            return LocalCoordinator()
        if len(ranks) < self.world_size and self.node is not None:
            raise ConfigError(
                f"ranks {ranks} save under a tag of their own; with use_node_local_storage all ranks must have the same"
            )
        return RankCoordinator(
            self._store,
            ranks.index(self.rank),
            len(ranks),
            timeout_s=self._timeout_s,
            # Engines are numbered anew in every run, and DeepSpeed's store lives no longer than one.
            run_id="deepspeed",
            node=self.node,
            channel="all" if len(ranks) == self.world_size else f"{crc32(repr(ranks).encode()):08x}",
            linger_s=_LINGER_S,
        )
