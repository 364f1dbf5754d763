"""The plugin itself: Lightning's four calls on top of the engine."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...engine.engine import AsyncCheckpointEngine
from ...errors import CheckpointError, CheckpointNotFoundError, ends_with_0, report
from ...storage.filesystem import FileSystem
from ..frameworks import checked_config
from ..guarding import check_guardable
from .followups import FollowUps, switch_link
from .framework import checkpoint_io_class, cooperate, default_weights_only
from .single_file import DATA_NAME, CheckpointFile, FileCoordinator, load_file, remove, settle

_DECIDED = {
    "root": "by Lightning's callbacks",
    "overwrite": "a file that is saved again is replaced",
    "coordinator": "one rank saves",
    "format": "torch's",
    "retention": "by Lightning's callbacks",
}

_CheckpointIO: Any = checkpoint_io_class()


class AsyncCkptIO(_CheckpointIO):  # type: ignore[misc]
    """Saves Lightning's checkpoints in the background: ``Trainer(plugins=[AsyncCkptIO()])``.

    Guarantees:
    - `save_checkpoint` has copied the state when it returns; the file appears at its path, whole and durable, later.
    - A failed save, link, deletion or hook raises at the next save, or when the trainer tears down, at the latest.
    - No older checkpoint is deleted, and no ``last.ckpt`` link switched, before the newer one is durable.
    - `load_checkpoint` waits for what is pending and compares every byte with the manifest; a file that has none (stock
      Lightning's, or copied without its folder ``.async_ckpt``) is compared with the checksums inside it.

    One thread at a time. May be used for several ``fit`` calls. A save by hand (``trainer.save_checkpoint``) after
    ``fit`` has ended returns when the file is there: no training overlaps with it, and nothing would tear down after
    it.

    Args:
        guard: make saves lazy for the trainer's optimizers, from the start of each ``fit`` on. Not the default: only
            for training in which nothing but an optimizer's own step changes its tensors (no `EMAWeightAveraging`,
            say).
        on_commit: called with the path of each committed file, on a background thread, in order; it may block (an
            upload), and the file is not deleted before it returns.
        verify: "full" checks every byte on load, "off" nothing.
        config: `EngineConfig` fields such as ``staging_bytes``; not root, overwrite, coordinator, format and retention,
            which Lightning's callbacks decide.

    Raises:
        ConfigError: a field that is unknown, wrong, or set by this plugin itself.
    """

    def __init__(
        self,
        *,
        guard: bool = False,
        on_commit: Callable[[str], object] | None = None,
        verify: str = "full",
        **config: Any,
    ) -> None:
        self._config = config
        self._guards = guard
        self._on_commit = on_commit
        self._verify = verify
        self._filesystem: FileSystem = checked_config(config, _DECIDED).filesystem or FileSystem()
        self._guarded: list[torch.optim.Optimizer] = []
        self._after: FollowUps | None = None
        # Lightning's trainer has torn down and has not begun again.
        self._is_over = False
        cooperate(AsyncCkptIO)

    # Lightning's interface.

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Snapshot `checkpoint` and write it to `path` in the background; after `teardown`, until the file is there.

        Blocks for the copy (about one memcpy), while staging memory is full, and while `max_pending_commits` are
        unfinished.

        Raises:
            CheckpointError: this snapshot cannot be taken, or an earlier save failed. Anything that an `on_commit` hook
                raised.
        """
        if storage_options is not None:
            raise TypeError(
                "`Trainer.save_checkpoint(..., storage_options=...)` is not supported by AsyncCkptIO: it writes "
                "local files"
            )
        place = CheckpointFile.of(path)
        after = self._running(place)
        engine = after.engine
        after.raise_failure()
        engine.create(place)
        after.saving(place)
        try:
            engine.save(checkpoint, DATA_NAME)
            pending = engine.commit(place.tag, metadata=_metadata(checkpoint, place))
        except BaseException:
            engine.abort(place.tag)
            raise
        after.saved(place, pending)
        if self._is_over:
            try:
                # Raises, also where `teardown` would only log: the caller may be handling another exception.
                self.wait()
            finally:
                self.teardown()

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint, verified; waits for pending saves first. Files of stock Lightning are read too.

        Args:
            weights_only: None is what the installed Lightning uses by itself.

        Raises:
            CheckpointNotFoundError (a FileNotFoundError), CorruptCheckpointError. CheckpointError: the save to this
            path failed.
        """
        place = CheckpointFile.of(path)
        if self._after is not None:
            self._after.drain()
            newest = self._after.newest(place)
            if newest is not None and (error := newest.failure()) is not None:
                raise error
        try:
            settle(self._filesystem, place.folder)
        except (CheckpointError, OSError) as error:
            # A reader may have no right to write here, and nothing to settle.
            if not isinstance(error, CheckpointNotFoundError):
                report(logging.WARNING, "%s could not be tidied before reading: %s", place.folder, error)
        only = default_weights_only() if weights_only is None else weights_only
        options = {"map_location": map_location, "weights_only": only}
        loaded: dict[str, Any] = load_file(self._filesystem, place, verify=self._verify, **options)
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a file, pending ones too, once all saves before this call are durable. A missing one is fine. Does not
        block.
        """
        place = CheckpointFile.of(path)
        if self._after is not None:
            self._after.remove(place)
        else:
            remove(self._filesystem, place)

    def teardown(self) -> None:
        """Block until everything is committed, linked and deleted; stop all threads. The plugin can be used again.

        Raises:
            CheckpointError: the first failure that was not raised yet; while another exception is on its way out, that
                does not end the program with exit code 0, it is logged instead.
        """
        self._is_over = True
        after = self._after
        if after is None:
            return
        unwinding = sys.exc_info()[1]
        self._after = None
        try:
            after.close()
            after.raise_failure()
        except Exception as failure:
            if unwinding is None or ends_with_0(unwinding):
                raise
            report(logging.ERROR, "a checkpoint was lost: %s", failure)

    # What Lightning does not ask for.

    def prepare(self, dirpath: Any) -> None:
        """Start the engine for saves to this directory, so that the first one finds warm memory. `ModelCheckpoint` does
        it: from now on until `teardown`, saves go on in the background.
        """
        self._is_over = False
        self._running(CheckpointFile.of(os.path.join(dirpath, "any")))

    def fit_started(self, optimizers: Sequence[torch.optim.Optimizer], module: torch.nn.Module) -> None:
        """With ``guard=True``, guard what trains `module`; `ModelCheckpoint` calls it on every rank.

        Raises:
            ConfigError: their tensors also change between their steps.
        """
        if self._guards:
            for optimizer in optimizers:
                check_guardable(optimizer, module)
            self.guard(*optimizers)

    def wait(self) -> None:
        """Block until every save so far is committed, linked and deleted.

        Raises:
            CheckpointError: the first failure that was not raised yet.
        """
        if self._after is not None:
            self._after.drain()
            self._after.raise_failure()

    def guard(self, *optimizers: torch.optim.Optimizer) -> None:
        """Make saves lazy for these optimizers' tensors; see `AsyncCheckpointEngine.guard`. Call it in
        ``on_fit_start``.

        Raises:
            ConfigError: one of them changes weights outside of its own step.
        """
        for optimizer in optimizers:
            check_guardable(optimizer)
        self._guarded += [optimizer for optimizer in optimizers if optimizer not in self._guarded]
        if self._after is not None:
            self._after.engine.guard(*optimizers)

    @property
    def engine(self) -> AsyncCheckpointEngine | None:
        """The engine that does the work; None before the first save and after teardown."""
        return None if self._after is None else self._after.engine

    def is_pending(self, path: Any) -> bool:
        """Whether a save to `path` has not ended yet. Never blocks."""
        return self._after is not None and self._after.is_pending(CheckpointFile.of(path))

    def link(self, target: Any, link: Any) -> None:
        """Point the symbolic link at `target` once that is committed."""
        if self._after is not None:
            self._after.link(CheckpointFile.of(target), CheckpointFile.of(link))
        else:
            switch_link(self._filesystem, CheckpointFile.of(target), CheckpointFile.of(link))

    # Inside.

    def _running(self, place: CheckpointFile) -> FollowUps:
        if self._after is None:
            coordinator = FileCoordinator()
            engine = AsyncCheckpointEngine(
                root=place.root, overwrite="replace", coordinator=coordinator, **self._config
            )
            engine.guard(*self._guarded)
            self._after = FollowUps(engine, self._filesystem, coordinator, self._on_commit)
        self._after.coordinator.prepare(place)
        return self._after

    def __getstate__(self) -> dict[str, Any]:
        # Launchers that spawn send the plugin to their processes: its settings travel, its threads do not.
        return {**self.__dict__, "_after": None, "_guarded": []}


def _metadata(checkpoint: dict[str, Any], place: CheckpointFile) -> dict[str, Any]:
    found = {"epoch": checkpoint.get("epoch"), "step": checkpoint.get("global_step")}
    numbers = {name: value for name, value in found.items() if isinstance(value, int)}
    return {"framework": "lightning", "file": place.name, **numbers}
