"""Tensors out of one rank's file: read in parallel, and without `torch.load` where a blob starts as `BlobPlanner` would
write it.

Guarantees:
- What is returned is what ``torch.load`` would return: everything before the payload, the pickle with dtype, shape and
  stride among it, is compared byte by byte with a blob planned here; all others go through
  ``torch.load(weights_only=True)``.
- Nothing is returned before the checksums of the extents it comes from have been compared.
- Of a large tensor only the rows that are wanted are read; memory beyond the result is a few extents.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from ...errors import CorruptCheckpointError, UnsupportedStateError
from ...plan.plan import FilePlan
from ...reading.build import NotPlainError
from ...reading.scatter import Scatter, new_storage
from ...reading.verified_file import VerifiedFile
from .blobs import BlobPlanner
from .objects import load_blob

_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
# Above it, a blob's payload is read straight to its place; below, many blobs share an extent, which is read once.
_LARGE_BYTES = 1 << 20
_AHEAD_BYTES = 32 << 20


class Unpacker:
    """Knows what blobs look like; keep it for all files of a load. One thread at a time.

    Args:
        described: by name, the metadata's word on what the blobs hold.
        weights_only: False lets a tensor of another class run its code.
    """

    def __init__(self, described: Mapping[str, Any], *, weights_only: bool) -> None:
        self._described = described
        self._weights_only = weights_only
        self._planner = BlobPlanner()

    def tensor(self, file: VerifiedFile, info: Any, item: ReadItem, name: str) -> torch.Tensor:
        """The part that `item` wants of the blob at `info`; valid while `file` keeps the extents that hold it. Raises
        CorruptCheckpointError: damaged, no torch container, or smaller than its metadata says.
        """
        dtype, shape = self._kind(item)
        plan = self._plan(dtype, shape, info.length)
        head = b"" if plan is None else plan.literals[0][1]
        if plan is None or plan.file_bytes != info.length or file.view(info.offset, len(head)) != head:
            return _narrow(self._load(file.view(info.offset, info.length), name), item, name)
        _check_box(shape, item, name)
        (payload_bytes,), payload = plan.payload_nbytes, info.offset + len(head)
        if not shape:
            return _read(file, payload, payload_bytes, dtype).view(())
        row_bytes = payload_bytes // shape[0]
        rows = _read(file, payload + item.storage_offsets[0] * row_bytes, item.lengths[0] * row_bytes, dtype)
        rows = rows.view(item.lengths[0], *shape[1:])
        for dim in range(1, len(shape)):
            rows = rows.narrow(dim, item.storage_offsets[dim], item.lengths[dim])
        return rows

    def _kind(self, item: ReadItem) -> tuple[torch.dtype, torch.Size]:
        """What a blob should hold: the shape is that of the stored chunk, not of the whole tensor."""
        index = item.storage_index
        known = self._described.get(index.fqn)
        if not isinstance(known, TensorStorageMetadata):
            return torch.uint8, torch.Size()
        # `index.index` is only a hint of where the chunk stands in the list.
        hint = index.index if index.index is not None else 0
        chunks = itertools.chain(known.chunks[hint : hint + 1], known.chunks)
        shape = next((chunk.sizes for chunk in chunks if chunk.offsets == index.offset), torch.Size(item.lengths))
        return known.properties.dtype, shape

    def _plan(self, dtype: torch.dtype, shape: torch.Size, blob_bytes: int) -> FilePlan | None:
        """How a blob of this dtype and shape would be laid out here: its head in one piece, then one payload."""
        # A damaged shape must not take memory: a blob is longer than its payload.
        num_bytes = math.prod(shape) * dtype.itemsize if min(shape, default=0) >= 0 else 0
        if dtype in _QUANTIZED or not 0 < num_bytes <= blob_bytes:
            return None
        # Never touched: only its description matters.
        return self._planner.tensor(torch.empty(shape, dtype=dtype, device="cpu"))[0]

    def _load(self, blob: memoryview, name: str) -> torch.Tensor:
        """What is not laid out as this package would: other tools' blobs, sparse, quantised, subclasses."""
        try:
            tensor = load_blob(blob, name, weights_only=self._weights_only)
        except NotPlainError as error:
            raise UnsupportedStateError(
                f"{name} is not plain data ({error}); give weights_only=False if you trust its writer"
            ) from error
        if not isinstance(tensor, torch.Tensor):
            raise CorruptCheckpointError(f"{name} holds no tensor", path=name)
        return tensor


def in_order(file: VerifiedFile, wanted: Iterable[tuple[Any, ReadItem]]) -> Iterator[tuple[Any, ReadItem]]:
    """Items with their places, as they lie in the file: each extent is read once, those of small blobs ahead and in one
    go, as many as may be held.
    """
    ordered = sorted(wanted, key=lambda pair: pair[0].offset)
    for k, (info, item) in enumerate(ordered):
        behind = info.offset // file.extent_bytes
        file.drop([extent for extent in file.kept() if extent < behind])
        if info.length < _LARGE_BYTES and not all(map(file.is_kept, file.extents_of(info.offset, info.length))):
            ahead: dict[int, None] = {}
            for small in (place for place, _ in ordered[k:] if place.length < _LARGE_BYTES):
                ahead.update(dict.fromkeys(file.extents_of(small.offset, small.length)))
                if len(ahead) * file.extent_bytes >= _AHEAD_BYTES:
                    break
            file.keep(ahead)
        yield info, item


def _read(file: VerifiedFile, offset: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """These bytes as a flat tensor, aligned as its elements need it."""
    num = nbytes // dtype.itemsize
    if nbytes >= _LARGE_BYTES:
        storage = new_storage(nbytes, torch.device("cpu"))
        scatter = Scatter()
        scatter.add(offset, nbytes, storage)
        scatter.freeze()
        file.stream(scatter, file.extents_of(offset, nbytes))
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, (num,), (1,))
    flat = torch.empty(num, dtype=dtype, device="cpu")
    if nbytes:
        with warnings.catch_warnings():
            # The bytes may be read-only: they are only read.
            warnings.simplefilter("ignore", UserWarning)
            flat.view(torch.uint8).copy_(torch.frombuffer(file.view(offset, nbytes), dtype=torch.uint8))
    return flat


def _check_box(shape: torch.Size, item: ReadItem, name: str) -> None:
    if len(item.storage_offsets) != len(shape):
        told = f"{name} has {len(shape)} dimensions, not the {len(item.storage_offsets)} wanted"
        raise CorruptCheckpointError(told, path=name)
    for size, start, length in zip(shape, item.storage_offsets, item.lengths, strict=True):
        if not 0 <= start <= start + length <= size:
            raise CorruptCheckpointError(f"{name} is smaller than its metadata says", path=name)


def _narrow(tensor: torch.Tensor, item: ReadItem, name: str) -> torch.Tensor:
    _check_box(tensor.size(), item, name)
    for dim, (start, length) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
        # Sparse and quantised tensors are stored whole, and know no narrower view.
        if length != tensor.size(dim):
            tensor = tensor.narrow(dim, start, length)
    return tensor
