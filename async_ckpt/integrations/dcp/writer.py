"""A ``StorageWriter``: checkpoints of torch.distributed.checkpoint, in its own on-disk form, written and committed our
way.

Call order, by DCP: `reset`, `set_up_storage_writer`, `prepare_local_plan`, `prepare_global_plan` (coordinator),
`write_data`, and `finish` (coordinator, after every rank's `write_data` has succeeded). Source:
``torch/distributed/checkpoint/storage.py``.

Guarantees:
- Nothing appears under the checkpoint's name before `finish` has renamed it, whole and durable; an older one there
  stays as it was.
- A failure on any rank raises on all of them (by DCP); what was staged is removed by the next `reset`, by `close`, or
  when the writer is dropped, and by the next engine's sweep where the process has died.
- Stock ``dcp.load`` and ``dcp_to_torch_save`` read the result; the manifest beside it makes it verifiable.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
import uuid
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from ...engine.config import EngineConfig
from ...engine.pipeline import SavePipeline
from ...errors import CheckpointError, CheckpointNotFoundError, ConfigError, TransactionStateError, UnsafePathError
from ...format.checksum import crc32
from ...format.manifest import FileEntry, Manifest, ManifestBudget
from ...format.metadata import check_metadata
from ...format.names import DCP_METADATA_NAME, check_tag, is_url, parse_private_name
from ...plan.plan import PlannedState
from ...storage import transaction
from ...storage.filesystem import FileSystem
from ...storage.staged import Destination, Staging
from ...threads.outcome import Outcome
from ...writer.file import FileWrite
from .blobs import BlobPlanner, file_name, plan_file
from .metadata import encode_metadata, write_results

_CLOSE_TIMEOUT_S = 60.0


def split_checkpoint_id(checkpoint_id: str | os.PathLike[str]) -> tuple[str, str]:
    """(root, tag) of "<root>/<tag>". Raises UnsafePathError: the last part cannot be a tag. ConfigError: a URL."""
    if is_url(checkpoint_id):
        raise ConfigError(f"{checkpoint_id!r} is a store: write to a local root, and mirror it (`async-ckpt mirror`)")
    root, tag = os.path.split(os.path.abspath(os.fspath(checkpoint_id)))
    return root, check_tag(tag)


def _tensor_bytes(plan: SavePlan) -> int:
    tensors = [item.tensor_data for item in plan.items if item.tensor_data is not None]
    return sum(data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in tensors)


@dataclasses.dataclass(frozen=True)
class _RankPlace:
    """Where one rank writes, told by the coordinator through its plan."""

    tag: str
    staging_name: str
    rank: int


class _Core:
    """An engine's pipeline: snapshots planned files and writes them. `write` by one thread at a time."""

    def __init__(self, config: EngineConfig) -> None:
        self.filesystem: FileSystem = config.filesystem or FileSystem()
        self.planner = BlobPlanner()
        self._pipeline = SavePipeline(config, self.filesystem, name="async-ckpt-dcp", min_chunks=2)
        self.close = weakref.finalize(self, _close, self._pipeline, os.getpid())
        """Stops the threads and gives the memory back; idempotent, and called when this is dropped."""

    def write(self, state: PlannedState, path: str, name: str) -> Outcome[FileWrite]:
        """Copy `state` into staging memory and write it to `path`; resolves when the file is synced. Blocks for the
        copy and for free staging memory.
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


_kept: dict[Any, _Core] = {}
"""Of copies, which live as long as this process: that of ``async_save`` gets a new one for each save."""


def _abort(fs: FileSystem, staging: Staging, pid: int) -> None:
    """Remove what a save of process `pid` has staged, in that process. Left behind, the next engine sweeps it."""
    if os.getpid() == pid:
        with contextlib.suppress(CheckpointError, OSError):
            transaction.abort(fs, staging)


class DcpWriter(StorageWriter):
    """Give it to ``dcp.save`` or ``dcp.async_save`` (thread or process) as `storage_writer`, with
    `checkpoint_id="<root>/<tag>"`.

    Args:
        path: the checkpoint's path, where none is given to ``dcp.save`` as `checkpoint_id`.
        overwrite: "refuse" an existing checkpoint, or "replace" it atomically.
        metadata: JSON values for the manifest.
        options: `EngineConfig` fields for staging and writing (`staging_bytes`, `chunk_bytes`, `num_writers`,
            `io_mode`, ...).

    Memory and threads are made at the first save and kept until `close`. One save at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        overwrite: str = "refuse",
        metadata: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self._user_metadata = check_metadata(metadata)
        self._config = EngineConfig.from_params({"root": "unused", "overwrite": overwrite, **options})
        self._is_copy = False
        self._core: _Core | None = None
        self._root = self._tag = ""
        self._save_id = ""
        self._staging: Staging | None = None
        self._unstage: weakref.finalize[..., DcpWriter] | None = None
        if path is not None:
            self._root, self._tag = split_checkpoint_id(path)

    # DCP's calls.

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        try:
            split_checkpoint_id(checkpoint_id)
        except (UnsafePathError, TypeError, ConfigError):
            return False
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._drop_staged()
        if checkpoint_id is not None:
            self._root, self._tag = split_checkpoint_id(checkpoint_id)
        if not self._tag:
            raise ConfigError("no checkpoint path: give checkpoint_id to dcp.save, or path to DcpWriter")
        self._save_id = str(uuid.uuid4())

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(checkpoint_id=self.checkpoint_id, save_id=self._save_id)

    @property
    def checkpoint_id(self) -> str:
        """Path of the checkpoint being saved."""
        return os.path.join(self._root, self._tag)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("use_collectives") is False:
            raise ConfigError("use_collectives=False is not supported: one rank must commit for all")

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        budget = ManifestBudget()
        # All ranks have the coordinator's chunks, or the manifest is a little smaller or larger.
        chunk_bytes = self._config.resolved_chunk_bytes()
        for rank, plan in enumerate(plans):
            budget.add_file(file_name(rank), _tensor_bytes(plan), chunk_bytes)
        budget.check_metadata(self._user_metadata)
        fs = self._open_core().filesystem
        transaction.make_root(fs, self._root)
        where = Destination(self._root, self._tag)
        staging = transaction.begin(fs, Staging(where, self._config.overwrite))
        self._drop_staged()
        self._staging, self._unstage = staging, weakref.finalize(self, _abort, fs, staging, os.getpid())
        name = os.path.basename(staging.path)
        return [
            dataclasses.replace(plan, storage_data=_RankPlace(self._tag, name, rank)) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        place = plan.storage_data
        if not isinstance(place, _RankPlace):
            raise TransactionStateError("the plan does not say where to write: prepare_global_plan was not called")
        core = self._open_core()
        location = self._locate(place)
        state, items = plan_file(plan, planner, core.planner)
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        if not items:
            future.set_result([])
            return future
        name = file_name(place.rank)
        written = core.write(state, os.path.join(location, name), name)

        def on_written(done: Outcome[FileWrite]) -> None:
            error = done.exception()
            if error is not None:
                # Annotated as a result by torch, though documented as an exception.
                future.set_exception(error)  # type: ignore[arg-type]
                return
            file, crcs = done.result(), tuple(done.result().extent_crc32)
            sizes = file.size_bytes, file.extent_bytes
            entry = FileEntry(name, *sizes, crcs, "opaque", "dcp", state.plan.plan_hash, place.rank)
            future.set_result(write_results(items, name, entry))

        written.when_done(on_written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        staging = self._staging
        if staging is None or self._unstage is None:
            raise TransactionStateError("there is no staging directory: this rank's prepare_global_plan was not called")
        fs = self._open_core().filesystem
        raw = encode_metadata(metadata, results, self.storage_meta())
        fs.create_file(os.path.join(staging.path, DCP_METADATA_NAME), raw)
        entries = [entry for per_rank in results for result in per_rank if (entry := result.storage_data[1])]
        entries.append(FileEntry(DCP_METADATA_NAME, len(raw), len(raw), (crc32(raw),), "opaque", "dcp", None))
        transaction.publish(fs, staging, Manifest(self._tag, time.time_ns(), tuple(entries), self._user_metadata))
        self._unstage.detach()
        self._staging = None

    def close(self) -> None:
        """Remove what an unfinished save has staged, stop the threads. Blocks until writes have ended."""
        self._drop_staged()
        core, self._core = self._core, None
        if core is not None and not self._is_copy:
            core.close()

    # Inside.

    def _drop_staged(self) -> None:
        self._staging = None
        if self._unstage is not None:
            # Once: a second call does nothing.
            self._unstage()

    def _open_core(self) -> _Core:
        if self._core is None:
            key = os.getpid(), repr(self._config)
            self._core = (self._is_copy and _kept.get(key)) or _Core(self._config)
            if self._is_copy:
                _kept[key] = self._core
        return self._core

    def _locate(self, place: _RankPlace) -> str:
        """This save's staging directory. A planner that caches plans hands out the place of an earlier save: then look
        for the new one.
        """
        fs = self._open_core().filesystem
        if place.tag == self._tag:
            with contextlib.suppress(CheckpointNotFoundError):
                return transaction.join(fs, self._root, self._tag, place.staging_name)
        known = parse_private_name(place.staging_name)
        found = [parsed for name in fs.listdir(self._root) if (parsed := parse_private_name(name)) is not None]
        mine = [
            p for p in found if known is not None and (p.kind, p.tag, p.owner) == ("staging", self._tag, known.owner)
        ]
        if not mine:
            told = f"no staging directory of {self._tag!r} in {self._root!r}; does every rank see the same file system?"
            raise CheckpointNotFoundError(f"{told} Nothing was written")
        return os.path.join(self._root, max(mine, key=lambda parsed: parsed.number).name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_core": None, "_staging": None, "_unstage": None, "_is_copy": True}
