"""What a DCP writer needs of an engine: staging arena, writer pool, snapshotter. Its own, or borrowed from an engine."""

from __future__ import annotations

import os
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from ...engine.config import EngineConfig
from ...errors import TransactionStateError
from ...host.device import pinning
from ...snapshot.arena import StagingArena
from ...snapshot.copy_threads import num_copy_helpers
from ...snapshot.snapshotter import Snapshotter
from ...storage.filesystem import FileSystem
from ...storage.local_filesystem import LocalFileSystem
from ...writer.chunks import WrittenFile
from ...writer.pool import WriterPool
from .blobs import BlobPlanner

if TYPE_CHECKING:
    from ...plan.plan import PlannedState


class Core:
    """Snapshots planned files and writes them. `write` by one thread at a time; `close` once."""

    def __init__(self, config: EngineConfig) -> None:
        chunk_bytes = config.resolved_chunk_bytes()
        self.filesystem: FileSystem = config.filesystem or LocalFileSystem()
        self.planner = BlobPlanner()
        self._pid = os.getpid()
        self._timeout_s = config.backpressure_timeout_s
        self._pool = WriterPool(
            self.filesystem,
            num_writers=config.num_writers,
            num_helpers=num_copy_helpers(),
            io_mode=config.io_mode,
            name="async-ckpt-dcp",
        )
        self._arena = StagingArena(max(2, config.resolved_staging_bytes() // chunk_bytes), chunk_bytes, pinning=pinning(config.pin_memory))
        self._pool.on_death(self._arena.poison)
        self._snapshotter = Snapshotter(self._arena, self._pool, timeout_s=config.backpressure_timeout_s)
        self._finalizer = weakref.finalize(self, _close, self._pool, self._arena, self._pid, 60.0)

    def write(self, state: PlannedState, path: str, name: str) -> Future[WrittenFile]:
        """Copy `state` into staging memory and write it to `path`. Blocks for the copy and for free staging memory.

        The future resolves when the file is synced.
        """
        file = self._pool.open_file(path, size_bytes=state.plan.file_bytes, seal=state.plan.sealer())
        try:
            self._snapshotter.take(state, file, name=name)
        except BaseException as error:
            file.abort(error)
            raise
        return file.done

    def close(self, timeout_s: float) -> None:
        """Stop the threads and give the memory back."""
        if self._finalizer.detach() is not None:
            _close(self._pool, self._arena, self._pid, timeout_s)


def _close(pool: WriterPool, arena: StagingArena, pid: int, timeout_s: float) -> None:
    if os.getpid() == pid:
        arena.poison(TransactionStateError("the DCP writer is closed"))
        pool.close(timeout_s)
        arena.close()


_kept: dict[Any, Core] = {}


def kept_core(config: EngineConfig, key: Any) -> Core:
    """A core that lives as long as this process: the checkpointing process of ``async_save`` gets a new writer for each save."""
    core = _kept.get((os.getpid(), key))
    if core is None:
        core = _kept[os.getpid(), key] = Core(config)
    return core
