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
import logging
import os
import pickle
import time
import uuid
import weakref
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from ...engine.config import EngineConfig
from ...errors import (
    CheckpointNotFoundError,
    ConfigError,
    TransactionStateError,
    UnsafePathError,
    UnsupportedStateError,
    report,
)
from ...format.checksum import crc32
from ...format.manifest import FileEntry, ManifestBudget
from ...format.metadata import check_metadata
from ...format.names import DCP_METADATA_NAME, check_tag, is_url, parse_private_name
from ...plan.plan import FilePlan, version_counters
from ...storage import transaction
from ...storage.filesystem import FileSystem
from ...storage.staged import Destination, Staging
from ...threads.outcome import Outcome
from ...writer.file import FileWrite
from .blobs import BlobPlanner, Extent, join_blobs, own_size, raw_plan
from .core import Core, abort, kept_core
from .objects import padded, unknown_types


@dataclasses.dataclass(frozen=True)
class RankPlace:
    """Where one rank writes, told by the coordinator through its plan."""

    tag: str
    staging_name: str
    rank: int
    plan_name: str = ""
    """The name of the global plan that it is a part of."""

    @property
    def file_name(self) -> str:
        return f"__{self.rank}_0.distcp"


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a rank tells the coordinator about one item: where it lies; with the first, the file's manifest entry."""

    info: _StorageInfo
    entry: FileEntry | None


def split_checkpoint_id(checkpoint_id: str | os.PathLike[str]) -> tuple[str, str]:
    """(root, tag) of "<root>/<tag>".

    Raises:
        UnsafePathError: the last component cannot be a tag. ConfigError: a URL.
    """
    if is_url(checkpoint_id):
        raise ConfigError(f"{checkpoint_id!r} is a store: write to a local root, and mirror it (`async-ckpt mirror`)")
    root, tag = os.path.split(os.path.abspath(os.fspath(checkpoint_id)))
    return root, check_tag(tag)


def plan_file(
    plan: SavePlan, planner: SavePlanner, blobs: BlobPlanner, room_for: Callable[[int, int], int] = own_size
) -> tuple[Any, list[tuple[Any, Extent]]]:
    """The planned file of one rank's items, and (item, extent) for each. Resolves the items' data, without a copy.

    Args:
        room_for: how many bytes item k has in the file, if it is an object of n bytes; it gets that long by zeros.
    """
    described: list[tuple[str, FilePlan, torch.Tensor | None]] = []
    met: list[tuple[str, torch.Tensor, int | None]] = []
    classes: dict[str, str] = {}
    for k, item in enumerate(plan.items):
        try:
            data = planner.resolve_data(item)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise UnsupportedStateError(
                f"{item.index.fqn!r} cannot be saved: {error}; nothing is visible of this checkpoint"
            ) from error
        if item.type == WriteItemType.BYTE_IO:
            raw = data.getvalue()  # type: ignore[union-attr]
            described.append((item.index.fqn, raw_plan(padded(raw, room_for(k, len(raw)))), None))
            if names := unknown_types(raw):
                classes[item.index.fqn] = ", ".join(names)
        else:
            tensor: torch.Tensor = data  # type: ignore[assignment]
            met.append((item.index.fqn, tensor, version_counters([tensor])[0]))
            described.append((item.index.fqn, *blobs.tensor(tensor)))
    if classes:
        listed = "; ".join(f"{name!r}: {kinds}" for name, kinds in list(classes.items())[:20])
        _tell_once(f"loads take these objects only with weights_only=False, which runs their classes' code: {listed}")
    state, extents = join_blobs(described, met)
    return state, list(zip(plan.items, extents, strict=True))


@lru_cache(maxsize=64)
def _tell_once(message: str) -> None:
    report(logging.WARNING, "%s", message)


def _tensor_bytes(plan: SavePlan) -> int:
    tensors = [item.tensor_data for item in plan.items if item.tensor_data is not None]
    return sum(data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in tensors)


def write_results(items: list[tuple[Any, Extent]], file_name: str, entry: FileEntry | None) -> list[WriteResult]:
    """What DCP passes on to `finish`; the entry travels with the first item."""
    return [
        WriteResult(
            item.index,
            extent.length,
            Stored(_StorageInfo(file_name, extent.offset, extent.length), entry if k == 0 else None),
        )
        for k, (item, extent) in enumerate(items)
    ]


def encode_metadata(metadata: Metadata, results: list[list[WriteResult]], meta: StorageMeta | None) -> bytes:
    """The bytes of `.metadata`, in the stock form."""
    metadata.storage_data = {result.index: result.storage_data.info for per_rank in results for result in per_rank}
    metadata.storage_meta = meta
    if hasattr(metadata, "version"):
        from torch.distributed.checkpoint import filesystem

        metadata.version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
    return pickle.dumps(metadata)


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
        self._overwrite = overwrite
        self._user_metadata = check_metadata(metadata)
        self._options = options
        self._config = EngineConfig.from_params({"root": "unused", "overwrite": overwrite, **options})
        self._is_copy = False
        self._core: Core | None = None
        self._root = self._tag = ""
        self._save_id = ""
        self._coordinates = False
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
        self._coordinates = is_coordinator

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        budget = ManifestBudget()
        # All ranks have the coordinator's chunks, or the manifest is a little smaller or larger.
        chunk_bytes = self._config.resolved_chunk_bytes()
        for rank, plan in enumerate(plans):
            budget.add_file(RankPlace(self._tag, "", rank).file_name, _tensor_bytes(plan), chunk_bytes)
        budget.check_metadata(self._user_metadata)
        fs = self._filesystem
        transaction.make_root(fs, self._root)
        where = Destination(self._root, self._tag)
        staging = transaction.begin(fs, Staging(where, self._overwrite))
        self._drop_staged()
        self._staging, self._unstage = staging, weakref.finalize(self, abort, fs, staging, os.getpid())
        name = os.path.basename(staging.path)
        return [
            dataclasses.replace(plan, storage_data=RankPlace(self._tag, name, rank)) for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        place = plan.storage_data
        if not isinstance(place, RankPlace):
            raise TransactionStateError("the plan does not say where to write: prepare_global_plan was not called")
        core = self._open_core()
        location = self._locate(place)
        state, items = plan_file(plan, planner, core.planner)
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        if not items:
            future.set_result([])
            return future
        written = core.write(state, os.path.join(location, place.file_name), place.file_name)

        def on_written(done: Outcome[FileWrite]) -> None:
            error = done.exception()
            if error is not None:
                # Annotated as a result by torch, though documented as an exception.
                future.set_exception(error)  # type: ignore[arg-type]
                return
            file, crcs = done.result(), tuple(done.result().extent_crc32)
            sizes = file.size_bytes, file.extent_bytes
            entry = FileEntry(place.file_name, *sizes, crcs, "opaque", "dcp", state.plan.plan_hash, place.rank)
            future.set_result(write_results(items, place.file_name, entry))

        written.when_done(on_written)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        staging = self._staging
        if staging is None or self._unstage is None:
            raise TransactionStateError(
                "there is no staging directory: prepare_global_plan was not called on this rank"
            )
        fs = self._filesystem
        raw = encode_metadata(metadata, results, self.storage_meta())
        fs.create_file(os.path.join(staging.path, DCP_METADATA_NAME), raw)
        entries = [
            result.storage_data.entry
            for per_rank in results
            for result in per_rank
            if result.storage_data.entry is not None
        ]
        entries.append(FileEntry(DCP_METADATA_NAME, len(raw), len(raw), (crc32(raw),), "opaque", "dcp", None))
        transaction.publish(fs, staging, entries, self._user_metadata, time.time_ns())
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

    @property
    def _filesystem(self) -> FileSystem:
        return self._open_core().filesystem

    def _open_core(self) -> Core:
        if self._core is None:
            key = tuple(sorted((name, repr(value)) for name, value in self._options.items()))
            self._core = kept_core(self._config, key) if self._is_copy else Core(self._config)
        return self._core

    def _locate(self, place: RankPlace) -> str:
        """This save's staging directory. A planner that caches plans hands out the place of an earlier save: then look
        for the new one.
        """
        fs = self._filesystem
        if place.tag == self._tag:
            with contextlib.suppress(CheckpointNotFoundError):
                return transaction.join(fs, self._root, self._tag, place.staging_name)
        known = parse_private_name(place.staging_name)
        found = [parsed for name in fs.listdir(self._root) if (parsed := parse_private_name(name)) is not None]
        mine = [
            p for p in found if known is not None and (p.kind, p.tag, p.owner) == ("staging", self._tag, known.owner)
        ]
        if not mine:
            raise CheckpointNotFoundError(
                f"no staging directory of {self._tag!r} in {self._root!r}; does every rank see the same file "
                "system? Nothing was written"
            )
        return os.path.join(self._root, max(mine, key=lambda parsed: parsed.number).name)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_core": None, "_staging": None, "_unstage": None, "_is_copy": True}
