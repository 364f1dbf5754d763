"""The engine behind one `Trainer`: its checkpoints in flight, and their failures."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...engine.engine import AsyncCheckpointEngine
from ...engine.pending import PendingCommit
from ...errors import CheckpointError, report
from ...ranks.coordinator import Coordinator
from ..frameworks import checked_config
from ..guarding import check_guardable, torch_optimizer
from .limit import SaveTotalLimit

_DECIDED = {"root": "by output_dir", "format": "by Trainer", "overwrite": "a step that is saved again replaces"}

# Engines are made in the same order on every rank, so the same number means the same engine.
_numbers = itertools.count()


class Saver:
    """Opens, commits and follows checkpoints below one root at a time. Training thread only.

    Guarantees: a failed commit is raised exactly once, by `poll`, `drain` or `close`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._timeout_s = checked_config(config, _DECIDED).backpressure_timeout_s
        self._config = dict(config)
        self._engine: AsyncCheckpointEngine | None = None
        self._root = ""
        self._in_flight: deque[tuple[str, PendingCommit, Callable[[str], object]]] = deque()

    def open(self, root: str, args: Any) -> AsyncCheckpointEngine:
        """The engine for `root`, as `TrainingArguments` want it; another root's is finished first."""
        if self._engine is not None and self._root != root:
            self.close()
        if self._engine is None:
            limit = args.save_total_limit
            retention = SaveTotalLimit(limit) if limit is not None and limit > 0 else None
            config = {"retention": retention, **self._config}
            if args.world_size > 1 and config.get("coordinator") is None:
                config["coordinator"] = self._coordinator(args.save_on_each_node)
            self._engine = AsyncCheckpointEngine(root=root, overwrite="replace", **config)
            self._root = root
        return self._engine

    def _coordinator(self, node_local: bool) -> Coordinator:
        from ...ranks.rank_coordinator import RankCoordinator

        if not torch.distributed.is_initialized():
            raise CheckpointError(
                "training on many ranks without a torch.distributed process group: give a `coordinator`"
            )
        channel = f"huggingface-{next(_numbers)}"
        return RankCoordinator.from_env(channel=channel, node_local=node_local, timeout_s=self._timeout_s)

    def guard(self, optimizer: Any, model: torch.nn.Module) -> None:
        """Make saves lazy for the torch optimizer inside Accelerate's wrappers.

        Raises:
            ConfigError: its tensors also change between its steps.
        """
        inner = torch_optimizer(optimizer)
        if self._engine is not None and inner is not None:
            check_guardable(inner, model)
            self._engine.guard(optimizer)

    def follow(self, path: str, pending: PendingCommit, then: Callable[[str], object]) -> None:
        """Call `then(path)` from `poll` or `drain` once this is committed."""
        self._in_flight.append((path, pending, then))

    def poll(self) -> None:
        """Report what has ended, oldest first. Does not wait for the disk.

        Raises:
            CheckpointError: a commit failed.
        """
        while self._in_flight and self._in_flight[0][1].done():
            path, pending, then = self._in_flight.popleft()
            failure = pending.exception()
            if failure is not None:
                raise failure
            then(path)

    def drain(self) -> None:
        """Block until every commit has ended, and report them.

        Raises:
            CheckpointError: the first one that failed; the rest has been waited for, and follows at the next call.
        """
        for _, pending, _ in self._in_flight:
            pending.wait(None)
        self.poll()

    def close(self, behind: BaseException | None = None) -> None:
        """`drain`, then stop all threads. Calling it again does nothing.

        Args:
            behind: an exception that is on its way out and must not be replaced: failures are logged.

        Raises:
            CheckpointError: the first failure that was not raised yet; others are logged.
        """
        failures: list[Exception] = []
        while self._in_flight:
            try:
                self.drain()
            except Exception as error:  # noqa: BLE001 - also a hook's; the first is raised below
                failures.append(error)
        engine, self._engine = self._engine, None
        try:
            if engine is not None:
                engine.close()
        except CheckpointError as error:
            failures.append(error)
        first = failures.pop(0) if failures and behind is None else None
        for failure in failures:
            report(logging.ERROR, "and a checkpoint was lost: %s (after %r)", failure, behind or first)
        if first is not None:
            raise first
