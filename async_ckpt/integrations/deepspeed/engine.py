"""DeepSpeed's checkpoint engine interface on top of `AsyncCheckpointEngine`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ...engine.engine import AsyncCheckpointEngine
from ...engine.interface import CheckpointEngine, StrPath, tag_of
from ...engine.pending import PendingCommit
from ...errors import CheckpointError, PathExistsError, TransactionStateError, report
from ...format.names import MANIFEST_NAME
from ...reading.load import load as load_file
from ...storage.filesystem import FileSystem
from ..frameworks import checked_config
from . import waiting
from .destination import DeepSpeedCoordinator, DeepSpeedDestination, KeepLatest, write_beside
from .outcomes import Outcomes
from .waiting import Save

_DECIDED = {
    "root": "it is DeepSpeed's save_dir",
    "overwrite": "as in DeepSpeed, a tag that is saved again is replaced",
    "coordinator": "it follows from the process group",
    "format": "it is DeepSpeed's",
}


class AsyncDeepSpeedEngine(CheckpointEngine):
    """A drop-in `checkpoint_engine` for DeepSpeed 0.19; `attach` puts it in place.

    Guarantees:
    - `save` has copied everything when it returns; tensors and Python objects may change at once.
    - A checkpoint appears under its tag, and `latest` names it, only when it is durable on all ranks.
    - All ranks get the same answer from `get_commit_info`, and the same failure from the same call.

    Alone (`overlap=False`) it is a blocking engine: `commit` returns when the checkpoint is durable. Overlap needs
    `attach`, because DeepSpeed tells an engine neither when a save is complete nor that it is about to load.

    Every method is for the training thread, and on many ranks for all of them in the same order.

    Args (the others are those of `attach`):
        config_params: a save_dir, a mapping of `EngineConfig` fields, or whatever DeepSpeed hands to its engines
            (ignored).
        node_local: each node has a save_dir of its own (DeepSpeed's `use_node_local_storage`).

    Raises:
        ConfigError: a field that is unknown, wrong, or set by this engine itself.
    """

    def __init__(
        self,
        config_params: Any = None,
        *,
        save_dir: StrPath | None = None,
        overlap: bool = False,
        node_local: bool = False,
        rank_timeout_s: float = 600.0,
        **config: Any,
    ) -> None:
        super().__init__(config_params)
        self.name = "AsyncDeepSpeedEngine"
        if isinstance(config_params, (str, os.PathLike)):
            save_dir = config_params if save_dir is None else save_dir
        elif isinstance(config_params, Mapping):
            config = {**config_params, **config}
        self.overlap = overlap
        self.save_dir = None if save_dir is None else os.path.abspath(os.fspath(save_dir))
        self._filesystem: FileSystem = config.get("filesystem") or FileSystem()
        self._config = {"compact_views": True, **config, "filesystem": self._filesystem}
        self._checked = checked_config(self._config, _DECIDED)
        self._guarded: list[torch.optim.Optimizer] = []
        self._inner: AsyncCheckpointEngine | None = None
        self._coordinator = job = DeepSpeedCoordinator(self._filesystem, rank_timeout_s, node_local=node_local)
        # This rank's disk, then the other ranks' (see `RankCoordinator` for the factor).
        self.patience_s = self._checked.backpressure_timeout_s + (3 * rank_timeout_s if job.world_size > 1 else 0)
        """How long a commit may take until its outcome is known here, in seconds."""
        self._outcomes = Outcomes(job.talk, self.patience_s)
        self._save: Save | None = None
        self._is_closed = False
        if self.save_dir is not None:
            self._engine(self.save_dir)

    # DeepSpeed's interface.

    def create(self, tag: Any) -> None:
        """DeepSpeed begins a save (`CheckpointCommitInfo`, or a bare tag). Blocks while too many commits are pending.

        Raises:
            CheckpointError: an earlier commit failed; every rank raises here.
        """
        if self._is_closed:
            raise TransactionStateError("this checkpoint engine was closed by cleanup() or destroy(); attach a new one")
        self.abandon(TransactionStateError("the next save began before this one was complete"))
        number, tags = self._outcomes.begin(tag_of(tag), self._checked.max_pending_commits)
        destination = DeepSpeedDestination.of(tag, self.save_dir, tags, number, self._coordinator)
        self._save = Save(tag, destination, self.patience_s)

    def makedirs(self, path: StrPath, exist_ok: bool = False) -> None:
        """A directory of the open checkpoint is staged; any other one is made at once."""
        save = self._save
        inside = None if save is None else save.destination.inside(path)
        if save is None or inside is None:
            if not exist_ok and self._filesystem.stat(os.path.abspath(os.fspath(path))).kind != "missing":
                raise PathExistsError(f"directory {os.fspath(path)!r} exists already")
            self._filesystem.makedirs(os.path.abspath(os.fspath(path)))
            return
        self._defer(save, lambda engine: engine.makedirs(inside, exist_ok=exist_ok) if inside else None)

    def save(self, state_dict: Any, path: StrPath) -> None:
        """Snapshot `state_dict`; a path outside the open checkpoint is written and synced before this returns.

        Raises:
            As `AsyncCheckpointEngine.save`. On many ranks the failure of one is kept until the save is complete,
            because the others are on their way to DeepSpeed's next barrier; it is raised where theirs is.
        """
        save = self._save
        inside = None if save is None else save.destination.inside(path)
        if save is None or not inside:
            write_beside(self._filesystem, os.fspath(path), state_dict)
            return
        self._defer(save, lambda engine: engine.save(state_dict, inside))

    def load(self, path: StrPath, map_location: Any = None) -> Any:
        """Load a file of a checkpoint, verified if this package wrote it; others as stock DeepSpeed does. Blocks.

        DeepSpeed's files hold Python objects, so their pickles run (`weights_only=False`): load only what you trust.
        """
        given = os.path.abspath(os.fspath(path))
        waiting.wait(os.path.realpath(given))
        if self._filesystem.stat(os.path.join(os.path.dirname(given), MANIFEST_NAME)).kind == "file":
            return load_file(given, map_location=map_location, weights_only=False)
        return torch.load(given, map_location=map_location, weights_only=False)

    def commit(self, tag: Any) -> bool:
        """Block until the checkpoint is durable on all ranks, and (if asked for) `latest` names it.

        Raises:
            CheckpointError: why it is not; on every rank.
        """
        if self._save is not None and self._save.destination.is_for(tag) and self.seal():
            self._outcomes.report_last()
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        """Which data parallel ranks write the model's states: the first."""
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        """Whether commits overlap training."""
        return self.overlap

    def set_commit_info(self, info: Any) -> None:
        """DeepSpeed never calls this."""

    def get_commit_info(self) -> Any:
        """What DeepSpeed may report as committed: an ended checkpoint, once, or None. Does not wait for the disk.

        `latest` is on disk then: the answer's `save_latest` is False, because DeepSpeed would overwrite it in place.

        Raises:
            CheckpointError: the oldest unreported checkpoint failed; every rank raises at the same call.
        """
        self.seal()
        info = self._outcomes.next()
        return replace(info, save_latest=False) if hasattr(info, "save_latest") else info

    def cleanup(self) -> None:
        """Finish what is pending, with its `latest`, and stop all threads; calling it again does nothing.

        Raises:
            CheckpointError: the first failure that was not raised yet.
        """
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self.abandon(TransactionStateError("the engine was closed before the save was complete"))
            self.drain()
        finally:
            (self._inner or self._coordinator).close()

    def preserves_storage_sharing(self) -> bool:
        """False with `compact_views`: files hold what tensors cover, so DeepSpeed need not clone them first."""
        return not self._config["compact_views"]

    # What DeepSpeed's interface lacks; `attach` calls these.

    def guard(self, *optimizers: torch.optim.Optimizer) -> None:
        """As `AsyncCheckpointEngine.guard`."""
        self._guarded += optimizers
        if self._inner is not None:
            self._inner.guard(*optimizers)

    def seal(self) -> bool:
        """The open checkpoint's saves are complete: commit it behind training. False at once if none is open."""
        save, self._save = self._save, None
        if save is None or not (save.is_open or save.error):
            return False
        if save.error is None:
            engine = self._engine(save.destination.save_dir)
            try:
                save.pending = engine.commit(save.destination.tag, metadata={"framework": "deepspeed"})
            except CheckpointError as error:
                save.error = error
        self._end(save)
        return True

    def abandon(self, error: BaseException) -> None:
        """Give the open checkpoint up, if there is one: nothing of it becomes visible, on no rank. Blocks for its
        writes.

        The caller raises `error`; the other ranks learn it in the background.
        """
        save, self._save = self._save, None
        if save is not None and (save.is_open or save.error):
            save.error, save.is_raised = error, True
            self._end(save)

    def drain(self) -> None:
        """Block until every pending checkpoint has ended, with its `latest`.

        Raises:
            CheckpointError: the first failure that was not raised yet.
        """
        self._outcomes.wait_all()

    def pending(self) -> list[PendingCommit]:
        """Commits that have not ended on this rank, oldest first."""
        return self._outcomes.pending()

    @property
    def engine(self) -> AsyncCheckpointEngine | None:
        """The engine that does the work; None before the first save where no save_dir was given."""
        return self._inner

    # Inside.

    def _engine(self, root: str) -> AsyncCheckpointEngine:
        if self._inner is None:
            config = dict(self._config)
            if config.get("retention") is not None:
                config["retention"] |= KeepLatest(self._filesystem, root)
            self._inner = AsyncCheckpointEngine(root=root, overwrite="replace", coordinator=self._coordinator, **config)
            self._inner.guard(*self._guarded)
        return self._inner

    def _defer(self, save: Save, work: Callable[[AsyncCheckpointEngine], object]) -> None:
        """Work with the engine that has this save open: only now, because `create` also announces exports beside it.

        On many ranks: keep the first failure for `seal`, so that this rank goes on to DeepSpeed's barriers with the
        others; nothing is tried after it.
        """
        if save.error is not None:
            return
        try:
            engine = self._engine(save.destination.save_dir)
            if not save.is_open:
                engine.create(save.destination)
                save.is_open = True
            work(engine)
        except CheckpointError as error:
            if self._coordinator.world_size == 1:
                raise
            save.error = error

    def _end(self, save: Save) -> None:
        """Its commit is on its way, or its error gives it up."""
        error, destination = save.error, save.destination
        self._outcomes.add(save)
        if error is None:
            return
        if save.is_open:
            try:
                raise error
            except BaseException:  # noqa: BLE001 -- `abort` tells the other ranks what it is called for
                self._engine(destination.save_dir).abort(destination.tag)
        report(logging.WARNING, "checkpoint %r was not completed and is given up: %s", destination.full_tag, error)
