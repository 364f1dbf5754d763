"""The engine behind one `Trainer`: its checkpoints in flight, and their failures."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...engine.config import EngineConfig
from ...engine.engine import AsyncCheckpointEngine
from ...engine.pending import PendingCommit
from ...errors import CheckpointError, ConfigError, report
from ...ranks.coordinator import Coordinator
from ...retention import RetentionPolicy
from ..guarding import check_guardable, torch_optimizer

_OWN_FIELDS = ("root", "format", "overwrite")

# Engines are made in the same order on every rank, so the same number means the same engine.
_numbers = itertools.count()


@dataclass(slots=True)
class _InFlight:
    path: str
    pending: PendingCommit
    then: Callable[[str], object]


class Saver:
    """Opens, commits and follows checkpoints below one root at a time. Training thread only.

    Guarantees: a failed commit is raised exactly once, by `poll`, `drain` or `close`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        own = [name for name in _OWN_FIELDS if name in config]
        if own:
            raise ConfigError(
                f"Trainer's own settings decide {', '.join(own)}: output_dir, safetensors, and that a step is "
                "saved again"
            )
        EngineConfig.from_params({"root": ".", **config})
        self._config = dict(config)
        self._engine: AsyncCheckpointEngine | None = None
        self._root = ""
        self._in_flight: deque[_InFlight] = deque()

    @property
    def engine(self) -> AsyncCheckpointEngine | None:
        """The engine that does the work; None before the first save and after training."""
        return self._engine

    def open(
        self, root: str, *, world_size: int, save_on_each_node: bool, retention: RetentionPolicy | None
    ) -> AsyncCheckpointEngine:
        """The engine for `root`; another root's is finished first."""
        if self._engine is not None and self._root != root:
            self.close()
        if self._engine is None:
            config = {"retention": retention, **self._config}
            if world_size > 1 and config.get("coordinator") is None:
                config["coordinator"] = _coordinator(config, save_on_each_node)
            self._engine = AsyncCheckpointEngine(root=root, overwrite="replace", **config)
            self._root = root
        return self._engine

    def guard(self, optimizer: Any, model: torch.nn.Module) -> None:
        """Make saves lazy for the torch optimizer inside Accelerate's wrappers.

        Raises:
            ConfigError: its tensors also change between its steps.
        """
        inner = torch_optimizer(optimizer)
        if self._engine is not None and inner is not None:
            check_guardable(inner, model)
            self._engine.guard(inner)

    def follow(self, path: str, pending: PendingCommit, then: Callable[[str], object]) -> None:
        """Call `then(path)` from `poll` or `drain` once this is committed."""
        self._in_flight.append(_InFlight(path, pending, then))

    def poll(self) -> None:
        """Report what has ended, oldest first. Does not wait for the disk.

        Raises:
            CheckpointError: a commit failed.
        """
        while self._in_flight and self._in_flight[0].pending.done():
            self._report(self._in_flight.popleft())

    def drain(self) -> None:
        """Block until every commit has ended, and report them.

        Raises:
            CheckpointError: the first one that failed; the rest has been waited for, and follows at the next call.
        """
        for flight in self._in_flight:
            flight.pending.wait(None)
        self.poll()

    def close(self) -> None:
        """`drain`, then stop all threads. Calling it again does nothing.

        Raises:
            CheckpointError: the first failure that was not raised yet; others are logged.
        """
        first: BaseException | None = None
        while self._in_flight:
            try:
                self.drain()
            except Exception as error:  # noqa: BLE001 - also a hook's; it is raised below
                if first is None:
                    first = error
                else:
                    report(logging.ERROR, "and another checkpoint failed: %s", error)
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        if first is not None:
            raise first

    def close_behind(self, error: BaseException) -> None:
        """`close` while `error` is on its way out and must not be replaced."""
        try:
            self.close()
        except Exception as failure:  # noqa: BLE001 - see above
            report(logging.ERROR, "while training ended with %r, a checkpoint was lost too: %s", error, failure)

    def _report(self, flight: _InFlight) -> None:
        failure = flight.pending.exception()
        if failure is not None:
            raise failure
        flight.then(flight.path)


def _coordinator(config: Mapping[str, Any], node_local: bool) -> Coordinator:
    from ...ranks.rank_coordinator import RankCoordinator

    if not torch.distributed.is_initialized():
        raise CheckpointError("training on many ranks without a torch.distributed process group: give a `coordinator`")
    timeout_s = float(config.get("backpressure_timeout_s", EngineConfig(root=".").backpressure_timeout_s))
    return RankCoordinator.from_env(channel=f"huggingface-{next(_numbers)}", node_local=node_local, timeout_s=timeout_s)
