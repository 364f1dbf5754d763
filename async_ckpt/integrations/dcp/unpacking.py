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

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ...errors import CorruptCheckpointError, UnsupportedStateError
from ...plan.plan import FilePlan
from ...reading.build import NotPlainError
from ...reading.scatter import Scatter, new_storage
from ...reading.verified_file import VerifiedFile
from .blobs import BlobPlanner
from .objects import load_blob

_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
# Above it, a blob's payload is read straight to its place; below, many blobs share an extent, which is read once.
LARGE_BYTES = 1 << 20
_AHEAD_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """What is wanted of a blob: a box in the stored tensor. `dtype` and `shape` are the metadata's guess."""

    offset: int
    length: int
    dtype: torch.dtype
    shape: torch.Size
    starts: Sequence[int]
    lengths: Sequence[int]
    name: str


class Unpacker:
    """Knows what blobs look like; keep it for all files of a load. One thread at a time.

    `weights_only=False` lets a tensor of another class run its code.
    """

    def __init__(self, *, weights_only: bool = True) -> None:
        self._weights_only = weights_only
        self._planner = BlobPlanner()

    def tensor(self, file: VerifiedFile, part: Part) -> torch.Tensor:
        """The wanted part of a blob; valid while `file` keeps the extents that hold it. Raises CorruptCheckpointError:
        damaged, no torch container, or smaller than its metadata says.
        """
        plan = self._plan(part)
        head = b"" if plan is None else plan.literals[0][1]
        if plan is None or plan.file_bytes != part.length or file.view(part.offset, len(head)) != head:
            return _narrow(self._load(file.view(part.offset, part.length), part), part)
        _check_box(part.shape, part)
        (payload_bytes,), payload = plan.payload_nbytes, part.offset + len(head)
        if not part.shape:
            return _read(file, payload, payload_bytes, part.dtype).view(())
        row_bytes = payload_bytes // part.shape[0]
        rows = _read(file, payload + part.starts[0] * row_bytes, part.lengths[0] * row_bytes, part.dtype)
        rows = rows.view(part.lengths[0], *part.shape[1:])
        for dim in range(1, len(part.shape)):
            rows = rows.narrow(dim, part.starts[dim], part.lengths[dim])
        return rows

    def _plan(self, part: Part) -> FilePlan | None:
        """How a blob of this dtype and shape would be laid out here: its head in one piece, then one payload."""
        # A damaged shape must not take memory: a blob is longer than its payload.
        num_bytes = math.prod(part.shape) * part.dtype.itemsize if min(part.shape, default=0) >= 0 else 0
        if part.dtype in _QUANTIZED or not 0 < num_bytes <= part.length:
            return None
        # Never touched: only its description matters.
        return self._planner.tensor(torch.empty(part.shape, dtype=part.dtype, device="cpu"))[0]

    def _load(self, blob: memoryview, part: Part) -> torch.Tensor:
        """What is not laid out as this package would: other tools' blobs, sparse, quantised, subclasses."""
        try:
            tensor = load_blob(blob, part.name, weights_only=self._weights_only)
        except NotPlainError as error:
            raise UnsupportedStateError(
                f"{part.name} is not plain data ({error}); give weights_only=False if you trust its writer"
            ) from error
        if not isinstance(tensor, torch.Tensor):
            raise CorruptCheckpointError(f"{part.name} holds no tensor", path=part.name)
        return tensor


def read_ahead(file: VerifiedFile, blobs: Iterable[tuple[int, int]]) -> None:
    """Read and verify the extents of the next blobs (offset, length) in one go, as many as may be held."""
    wanted: dict[int, None] = {}
    for offset, length in blobs:
        wanted.update(dict.fromkeys(file.extents_of(offset, length)))
        if len(wanted) * file.extent_bytes >= _AHEAD_BYTES:
            break
    file.keep(wanted)


def _read(file: VerifiedFile, offset: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """These bytes as a flat tensor, aligned as its elements need it."""
    num = nbytes // dtype.itemsize
    if nbytes >= LARGE_BYTES:
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


def _check_box(shape: torch.Size, part: Part) -> None:
    if len(part.starts) != len(shape):
        raise CorruptCheckpointError(
            f"{part.name} has {len(shape)} dimensions, not the {len(part.starts)} wanted", path=part.name
        )
    for size, start, length in zip(shape, part.starts, part.lengths, strict=True):
        if not 0 <= start <= start + length <= size:
            raise CorruptCheckpointError(f"{part.name} is smaller than its metadata says", path=part.name)


def _narrow(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    _check_box(tensor.size(), part)
    for dim, (start, length) in enumerate(zip(part.starts, part.lengths, strict=True)):
        # Sparse and quantised tensors are stored whole, and know no narrower view.
        if length != tensor.size(dim):
            tensor = tensor.narrow(dim, start, length)
    return tensor
