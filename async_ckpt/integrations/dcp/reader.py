"""A ``StorageReader``: ``dcp.load`` from a committed checkpoint, every byte compared with the manifest first.

Guarantees:
- Nothing reaches a tensor before the checksums of the extents it comes from have been compared.
- `.metadata` and the blobs run no code; what lies outside their file or fits no tensor is an error.
- The checkpoint stays the same one while it is read, also where it is replaced or deleted meanwhile.
"""

from __future__ import annotations

import io
import os
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader

from ...errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    StateMismatchError,
    UnsupportedStateError,
)
from ...format.names import DCP_METADATA_NAME, check_tag, is_url
from ...host.device import beside_captures, synchronize_device
from ...reading.build import NotPlainError
from ...reading.catalog import Catalog
from ...reading.committed import CommittedCheckpoint, check_level
from ...reading.shared_memory import COMPRESSED, overlapping, parts_of, same_bytes
from ...reading.verified_file import VerifiedFile
from .metadata import decode_metadata
from .objects import load_blob, unpadded
from .unpacking import Unpacker, in_order
from .writer import DcpWriter


class DcpReader(StorageReader):
    """Give it to ``dcp.load`` as `storage_reader`, with `checkpoint_id="<root>/<tag>"`, or a mirror's URL in its place.

    Args:
        path: the checkpoint's path, where none is given to ``dcp.load``.
        catalog: what `path` is read through; None: through the disk, or the store of its URL.
        verify: "full" compares checksums, "size" only sizes, "off" nothing.
        weights_only: refuse objects that are more than plain data (see `objects`), all of them in one error; DCP's own
            planner would run their code. False is for files whose writer you trust.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        verify: str = "full",
        weights_only: bool = True,
        catalog: Catalog | None = None,
    ) -> None:
        super().__init__()
        self._verify = check_level(verify)
        self._weights_only = weights_only
        self._path = None if path is None else _whole(path)
        self._catalog = catalog
        self._storage_data: dict[Any, Any] = {}
        self._unpacker: Unpacker
        self._quiet: set[torch.device] = set()
        """Devices that this load has waited for."""
        self._filled: list[tuple[Any, ReadItem, torch.Tensor]] = []
        """What this load has filled; nothing where a planner of the user's may have given memory of its own."""
        self.failure: CheckpointError | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return is_url(checkpoint_id) or DcpWriter.validate_checkpoint_id(checkpoint_id)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        self._storage_data, self.failure, self._quiet = {}, None, set()
        if checkpoint_id is not None:
            self._path, self._catalog = _whole(checkpoint_id), None
        if self._path is None:
            raise ConfigError("no checkpoint path: give checkpoint_id to dcp.load, or path to DcpReader")

    @property
    def checkpoint_id(self) -> str | None:
        """Path of the checkpoint being read."""
        return self._path

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises CheckpointNotFoundError, CorruptCheckpointError; DCP turns them into an AssertionError, so `failure`
        keeps them.
        """
        try:
            with self._open() as checkpoint:
                if checkpoint.manifest.file(DCP_METADATA_NAME) is None:
                    raise CheckpointNotFoundError(
                        f"{self._path!r} is a checkpoint, but not in DCP's form: load its files with engine.load"
                    )
                with self._file(checkpoint, DCP_METADATA_NAME) as file:
                    metadata = decode_metadata(file.read(0, file.size_bytes), source=file.name)
        except CheckpointError as error:
            self.failure = error
            raise
        return metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._storage_data = metadata.storage_data
        self._unpacker = Unpacker(metadata.state_dict_metadata, weights_only=self._weights_only)

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        per_file: dict[str, list[tuple[Any, ReadItem]]] = {}
        for item in plan.items:
            info = self._storage_data.get(item.storage_index)
            if info is None:
                what = f"{self._path}: .metadata says nowhere where {item.storage_index.fqn!r} is stored"
                raise CorruptCheckpointError(what, path=DCP_METADATA_NAME)
            per_file.setdefault(info.relative_path, []).append((info, item))
        refused: dict[str, str] = {}
        self._filled.clear()
        with self._open() as checkpoint:
            for path, wanted in per_file.items():
                with self._file(checkpoint, path) as file:
                    self._read_file(file, wanted, planner, refused)
            self._check_shared(checkpoint)
        if refused:
            listed = "; ".join(f"{name!r} holds {what}" for name, what in refused.items())
            raise UnsupportedStateError(
                f"not plain data: {listed}. Give weights_only=False if you trust the writer of {self._path!r}"
            )
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future

    def _read_file(
        self, file: VerifiedFile, wanted: list[tuple[Any, ReadItem]], planner: LoadPlanner, refused: dict[str, str]
    ) -> None:
        """Hand every item to the planner; objects that are no plain data go to `refused`."""
        for info, item in in_order(file, wanted):
            name = f"{file.name}, item {item.storage_index.fqn!r}"
            if item.type == LoadItemType.BYTE_IO:
                blob = unpadded(file.view(info.offset, info.length))
                try:
                    if self._weights_only:
                        load_blob(blob, name)
                    planner.load_bytes(item, io.BytesIO(blob))
                except NotPlainError as error:
                    refused[item.storage_index.fqn] = str(error)
                continue
            stored = self._unpacker.tensor(file, info, item, name)
            target = planner.resolve_tensor(item)
            if target.size() != stored.size():
                raise CorruptCheckpointError(
                    f"{name} has shape {tuple(stored.size())}, {tuple(target.size())} is wanted", path=file.name
                )
            if _quantization(target) != _quantization(stored):
                # Copied, the same numbers would mean other values.
                raise StateMismatchError(f"{name} has another quantization than the tensor in its place", (name,))
            if target.device.type != "cpu" and target.device not in self._quiet:
                # Kernels that still read the old values may be queued on any stream.
                synchronize_device(target.device)
                self._quiet.add(target.device)
            try:
                # Not into a detached view: of a sparse tensor that would be another one.
                with torch.no_grad():
                    if stored.layout in COMPRESSED and target.layout is stored.layout:
                        # Here, `copy_` wants room for as many values as there are.
                        target.resize_as_sparse_(stored)
                    with beside_captures(target.device):
                        target.copy_(stored)
            except RuntimeError as error:
                raise StateMismatchError(f"{name} does not fit the tensor in its place: {error}", (name,)) from error
            planner.commit_tensor(item, target)
            if _fills_in_place(planner):
                self._filled.append((info, item, target))

    def _check_shared(self, checkpoint: CommittedCheckpoint) -> None:
        """Raises StateMismatchError: tensors share memory, and the checkpoint holds different bytes for them."""
        filled, self._filled = self._filled, []
        parts = [(i, part) for i, (_, _, target) in enumerate(filled) for part in parts_of(target)]
        for group in overlapping([part for _, part in parts]):
            shared = [filled[i] for i in sorted({parts[k][0] for k in group})]
            for info, item, target in shared:
                with self._file(checkpoint, info.relative_path) as file, torch.no_grad():
                    was_read = target.clone()
                    was_read.copy_(self._unpacker.tensor(file, info, item, item.storage_index.fqn))
                if not all(map(same_bytes, parts_of(was_read), parts_of(target))):
                    names = ", ".join(sorted({repr(item.storage_index.fqn) for _, item, _ in shared}))
                    told = "share memory, and the checkpoint holds different bytes for them: the state is overwritten"
                    raise StateMismatchError(f"{names} {told}", (names,))

    def _open(self) -> CommittedCheckpoint:
        if self._path is None:
            raise ConfigError("no checkpoint path: give checkpoint_id to dcp.load, or path to DcpReader")
        root, tag = os.path.split(self._path)
        return (self._catalog or Catalog(root)).open(check_tag(tag))

    def _file(self, checkpoint: CommittedCheckpoint, path: str) -> VerifiedFile:
        return checkpoint.open_file(checkpoint.entry(path), check=self._verify == "full")


def _fills_in_place(planner: LoadPlanner) -> bool:
    kind: Any = type(planner)
    return isinstance(planner, DefaultLoadPlanner) and (kind.resolve_tensor, kind.transform_tensor) == (
        DefaultLoadPlanner.resolve_tensor,
        DefaultLoadPlanner.transform_tensor,
    )


def _whole(path: str | os.PathLike[str]) -> str:
    return path.rstrip("/") if isinstance(path, str) and is_url(path) else os.path.abspath(os.fspath(path))


def _quantization(tensor: torch.Tensor) -> Any:
    """What the numbers of a quantised tensor mean, to be compared; None for any other."""
    if not tensor.is_quantized:
        return None
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return tensor.qscheme(), tensor.q_scale(), tensor.q_zero_point()
    scales, zero_points = tensor.q_per_channel_scales().tolist(), tensor.q_per_channel_zero_points().tolist()
    return tensor.qscheme(), tensor.q_per_channel_axis(), scales, zero_points
