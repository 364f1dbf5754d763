"""The engine behind one `Trainer`: its checkpoints in flight, their failures, and how many of them stay."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...engine.engine import AsyncCheckpointEngine
from ...engine.pending import PendingCommit
from ...errors import CheckpointError, ConfigError, check_int, ends_with_0, report
from ...ranks.rank_coordinator import RankCoordinator
from ...retention import CheckpointInfo, RetentionPolicy
from ...threads.outcome import wait_all
from ..frameworks import checked_config
from ..guarding import check_guardable, torch_optimizer
from .resume import step_of

# These step inside the backward pass, where no hook can wait for a lazy copy.
_STEPS_IN_BACKWARD = ("layerwise", "lomo")

_DECIDED = {"root": "by output_dir", "format": "by Trainer", "overwrite": "a step that is saved again replaces"}

BEST = "best_model_checkpoint"
"""Metadata: the tag of the best checkpoint, as of this one."""

# Engines are made in the same order on every rank, so the same number means the same engine.
_numbers = itertools.count()


@dataclass(frozen=True)
class SaveTotalLimit(RetentionPolicy):
    """Keeps the newest `num` ``checkpoint-<step>`` and, as one of them, the best one that the newest knows of.

    As in `Trainer`: the newest and the best stay even where that makes one more than `num`. Other names are left alone.
    """

    num: int

    def __post_init__(self) -> None:
        check_int("SaveTotalLimit: num", self.num)

    @property
    def num_kept(self) -> int:
        return self.num

    def kept(self, checkpoints: Sequence[CheckpointInfo], now_unix_ns: int) -> dict[str, str]:
        reasons = {info.tag: "not a checkpoint of Trainer" for info in checkpoints if step_of(info.tag) < 0}
        ours = [info for info in checkpoints if step_of(info.tag) >= 0]
        if not ours:
            return reasons
        protected = {ours[-1].tag: "the newest"}
        best = ours[-1].metadata.get(BEST)
        if any(info.tag == best for info in ours):
            protected.setdefault(str(best), "the best")
        others = [info.tag for info in ours if info.tag not in protected]
        room = max(0, self.num - len(protected))
        reasons.update(dict.fromkeys(others[len(others) - room :], f"among the last {self.num}"))
        return {**reasons, **protected}


class Saver:
    """Opens, commits and follows checkpoints below one root at a time. Training thread only.

    Guarantees: a failed commit that is not tolerated is raised exactly once, by `poll`, `drain` or `close`.
    """

    def __init__(self, config: Mapping[str, Any], guard: bool) -> None:
        self._timeout_s = checked_config(config, _DECIDED).backpressure_timeout_s
        self._config = dict(config)
        self._guards = guard
        self._engine: AsyncCheckpointEngine | None = None
        self._root = ""
        self._in_flight: deque[tuple[str, PendingCommit, Callable[[str], object]]] = deque()

    def open(self, root: str, trainer: Any) -> AsyncCheckpointEngine:
        """The engine for `root`, as the trainer's arguments want it; another root's is finished first. Raises
        ConfigError: this training's state cannot be saved here, or not guarded."""
        if self._engine is not None and self._root != root:
            self.close()
        if self._engine is None:
            self._check_supported(trainer)
            limit = trainer.args.save_total_limit
            retention = SaveTotalLimit(limit) if limit is not None and limit > 0 else None
            config = {"retention": retention, **self._config}
            if trainer.args.world_size > 1 and config.get("coordinator") is None:
                if not torch.distributed.is_initialized():
                    raise CheckpointError(
                        "training on many ranks without a torch.distributed process group: give a `coordinator`"
                    )
                how = {"node_local": trainer.args.save_on_each_node, "timeout_s": self._timeout_s}
                config["coordinator"] = RankCoordinator.from_env(channel=f"huggingface-{next(_numbers)}", **how)
            self._engine = AsyncCheckpointEngine(root=root, overwrite="replace", **config)
            self._root = root
        # The torch optimizer inside Accelerate's wrappers.
        if self._guards and (inner := torch_optimizer(trainer.optimizer)) is not None:
            check_guardable(inner, trainer.model)
            self._engine.guard(trainer.optimizer)
        return self._engine

    def _check_supported(self, trainer: Any) -> None:
        if trainer.is_deepspeed_enabled:
            raise ConfigError(
                "DeepSpeed saves its own state: use async_ckpt.integrations.deepspeed.attach(trainer.deepspeed) instead"
            )
        if trainer.is_fsdp_enabled and "FULL_STATE_DICT" not in str(
            trainer.accelerator.state.fsdp_plugin.state_dict_type
        ):
            raise ConfigError(
                "FSDP with sharded state is not supported here: set fsdp_state_dict_type to FULL_STATE_DICT, or use "
                "async_ckpt.integrations.dcp"
            )
        if self._guards and any(name in str(trainer.args.optim) for name in _STEPS_IN_BACKWARD):
            raise ConfigError(
                f"guard=True cannot protect {trainer.args.optim}: it steps inside the backward pass. Give guard=False"
            )
        if getattr(trainer, "is_fsdp_xla_enabled", False) or str(trainer.args.device).startswith("xla"):
            raise ConfigError("XLA devices are not supported: their tensors cannot be snapshotted")

    def follow(self, path: str, pending: PendingCommit, then: Callable[[str], object]) -> None:
        """Call `then(path)` from `poll` or `drain` once this is committed."""
        self._in_flight.append((path, pending, then))

    def poll(self) -> None:
        """Report what has ended, oldest first. Does not wait for the disk. Raises CheckpointError: a commit failed; of
        several, the others follow at the next save or `close`."""
        first: BaseException | None = None
        while self._in_flight and self._in_flight[0][1].done():
            path, pending, then = self._in_flight.popleft()
            if pending.failure() is None:
                then(path)
            elif first is None:
                first = pending.loss()
        if first is not None:
            raise first

    def drain(self) -> None:
        """Block until every commit has ended, and report them as `poll`."""
        wait_all(pending for _, pending, _ in self._in_flight)
        self.poll()

    def close(self, behind: BaseException | None = None) -> None:
        """`drain`, then stop all threads. Raises the first failure that was not raised yet; others are logged, and so
        are all `behind` an exception that is on its way out, unless it would end the program with exit code 0."""
        engine, self._engine = self._engine, None
        if engine is None:
            return
        first = None if ends_with_0(behind) else behind
        while self._in_flight:
            try:
                self.drain()
            except Exception as error:  # noqa: BLE001 - also a hook's; raised below
                if first is not None:
                    report(logging.ERROR, "after %r: %s", first, error)
                first = first or error
        engine.__exit__(type(first) if first is not None else None, first, None)
        if first is not None and first is not behind:
            raise first
