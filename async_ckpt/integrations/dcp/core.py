"""What a DCP writer has running: an engine's pipeline."""

from __future__ import annotations

import contextlib
import os
import weakref
from typing import TYPE_CHECKING, Any

from ...engine.config import EngineConfig
from ...engine.pipeline import SavePipeline
from ...errors import CheckpointError
from ...storage import transaction
from ...storage.filesystem import FileSystem
from ...storage.staged import Staging
from ...threads.outcome import Outcome
from ...writer.file import FileWrite
from .blobs import BlobPlanner

if TYPE_CHECKING:
    from ...plan.plan import PlannedState

_CLOSE_TIMEOUT_S = 60.0


class Core:
    """Snapshots planned files and writes them. `write` by one thread at a time."""

    def __init__(self, config: EngineConfig) -> None:
        self.filesystem: FileSystem = config.filesystem or FileSystem()
        self.planner = BlobPlanner()
        self._pipeline = SavePipeline(config, self.filesystem, name="async-ckpt-dcp", min_chunks=2)
        self.close = weakref.finalize(self, _close, self._pipeline, os.getpid())
        """Stops the threads and gives the memory back; idempotent, and called when this is dropped."""

    def write(self, state: PlannedState, path: str, name: str) -> Outcome[FileWrite]:
        """Copy `state` into staging memory and write it to `path`. Blocks for the copy and for free staging memory.

        It resolves when the file is synced.
        """
        file = self._pipeline.pool.open_file(path, size_bytes=state.plan.file_bytes, seal=state.plan.sealer())
        try:
            self._pipeline.snapshotter.take(state, file, name=name)
        except BaseException as error:
            file.abort(error)
            raise
        return file.done


def _close(pipeline: SavePipeline, pid: int) -> None:
    if os.getpid() == pid:
        pipeline.stop(_CLOSE_TIMEOUT_S)


_kept: dict[Any, Core] = {}


def kept_core(config: EngineConfig, key: Any) -> Core:
    """A core that lives as long as this process: the one of ``async_save`` gets a new writer for each save."""
    core = _kept.get((os.getpid(), key))
    if core is None:
        core = _kept[os.getpid(), key] = Core(config)
    return core


def abort(fs: FileSystem, staging: Staging, pid: int) -> None:
    """Remove the staging directory of a save of process `pid`, in that process. Never raises."""
    if os.getpid() != pid:
        return
    # Left behind, it is swept by the next engine.
    with contextlib.suppress(CheckpointError, OSError):
        transaction.abort(fs, staging)
