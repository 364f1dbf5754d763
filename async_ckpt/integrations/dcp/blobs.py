"""One rank's file in the form of torch.distributed.checkpoint: blobs one after the other, each tensor a whole
torch.save container, and other objects as their planner has pickled them.

Guarantees:
- Planning reads no payload byte and copies none; a tensor's bytes come straight from its storage, also where it is a
  part of a larger one, or not contiguous.
- Each blob is what ``torch.save`` writes for a standalone contiguous tensor of that shape and dtype, with its conjugate
  and negative bit.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType

from ...errors import UnsupportedStateError, report
from ...format.checksum import crc32_combine
from ...format.sealer import Sealer
from ...plan.plan import FilePlan, PlannedState, planned_state, version_counters
from ...plan.planner import Planner
from ...plan.strided import Strided
from ...plan.structure import TENSOR_TYPES
from .objects import padded, unknown_types

_MAX_TEMPLATES = 4096

# What the manifest says of these files: no single torch container, laid out here.
_OPAQUE: Any = "opaque"
_DCP: Any = "dcp"


@dataclass(frozen=True, slots=True)
class JoinedPlan(FilePlan):
    """Several plans one after the other in one file; `parts` are (offset, plan), ascending and without gaps."""

    parts: tuple[tuple[int, FilePlan], ...] = ()

    def sealer(self) -> JoinedSealer:  # type: ignore[override]
        return JoinedSealer(self.parts)


class JoinedSealer:
    """Seals the extents of a joined file: each blob's part by its own sealer. Used like `format.sealer.Sealer`."""

    def __init__(self, parts: tuple[tuple[int, FilePlan], ...]) -> None:
        self._parts = parts
        self._next = 0
        self._sealer: Sealer | None = None

    def __call__(self, offset: int, view: memoryview) -> int:
        """Patch and checksum the extent that starts at file offset `offset`; extents come in order."""
        end, crc = offset + view.nbytes, 0
        while self._next < len(self._parts):
            start, plan = self._parts[self._next]
            if start >= end:
                break
            if self._sealer is None:
                self._sealer = plan.sealer()
            low, high = max(start, offset), min(start + plan.file_bytes, end)
            crc = crc32_combine(crc, self._sealer(low - start, view[low - offset : high - offset]), high - low)
            if high < start + plan.file_bytes:
                break
            self._next, self._sealer = self._next + 1, None
        return crc


class BlobPlanner:
    """Plans blobs; keeps the plan of each kind of tensor (dtype, shape, bits). One thread at a time."""

    def __init__(self) -> None:
        self._planner = Planner()
        self._templates: dict[Any, FilePlan] = {}

    def tensor(self, tensor: torch.Tensor) -> tuple[FilePlan, torch.Tensor | None]:
        """The blob of `tensor` and the tensor to copy from, row by row (None: the plan holds all bytes)."""
        if not is_plain(tensor):
            buffer = io.BytesIO()
            torch.save(tensor.detach().cpu(), buffer)
            return raw_plan(buffer.getvalue()), None
        source = tensor.detach()
        key = (source.dtype, source.shape, source.is_conj(), source.is_neg())
        plan = self._templates.get(key)
        if plan is None:
            if len(self._templates) >= _MAX_TEMPLATES:
                self._templates.clear()
            # Never touched: only its description is pickled.
            alike = flip_bits(torch.empty(source.shape, dtype=source.dtype, device="cpu"), source)
            plan = self._templates[key] = self._planner.plan(alike).plan
        return plan, source if source.numel() else None


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether storage, offset, size, stride and bits say all about it; not so of sparse, quantised, subclasses."""
    return tensor.layout is torch.strided and not tensor.is_quantized and type(tensor) in TENSOR_TYPES


def flip_bits(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A view of the same bytes, its conjugate and negative bit flipped where `like` has them set."""
    if like.is_conj():
        tensor = tensor.conj()
    return torch._neg_view(tensor) if like.is_neg() else tensor


def raw_plan(data: bytes) -> FilePlan:
    """A blob of bytes as they are."""
    return FilePlan(len(data), ((0, data),), (), (), format=_OPAQUE, planner=_DCP)


class Extent(NamedTuple):
    """Where a blob lies in its file."""

    offset: int
    length: int


def join_blobs(
    blobs: Iterable[tuple[FilePlan, torch.Tensor | None]], met: Sequence[tuple[str, torch.Tensor, int | None]] = ()
) -> tuple[PlannedState, list[Extent]]:
    """The file of these (plan, source) blobs, and where each lies. `met`: the user's tensors behind them, with their
    names and their version counters before anything of them was copied.
    """
    parts: list[tuple[int, FilePlan]] = []
    extents: list[Extent] = []
    literals: list[tuple[int, bytes]] = []
    offsets: list[int] = []
    sizes: list[int] = []
    storages: list[torch.UntypedStorage] = []
    starts: list[int] = []
    strided: dict[int, Strided] = {}
    position = 0
    for plan, source in blobs:
        extents.append(Extent(position, plan.file_bytes))
        if plan.file_bytes == 0:
            continue
        parts.append((position, plan))
        literals += [(position + offset, data) for offset, data in plan.literals]
        if source is not None:
            (offset,), (nbytes,) = plan.payload_offsets, plan.payload_nbytes
            offsets.append(position + offset)
            sizes.append(nbytes)
            if not source.is_contiguous():
                # The blob itself has the bits.
                strided[len(storages)] = Strided(source.dtype, tuple(source.shape), source.stride())
            storages.append(source.untyped_storage())
            starts.append(int(source.storage_offset()) * source.element_size())
        position += plan.file_bytes
    joined = JoinedPlan(
        position, tuple(literals), offsets, sizes, format=_OPAQUE, planner=_DCP, strided=strided, parts=tuple(parts)
    )
    names = [name for name, _, _ in met]
    tensors, versions = [tensor for _, tensor, _ in met], [version for _, _, version in met]
    return planned_state(joined, storages, starts, tensors, versions, lambda: names), extents


def file_name(rank: int) -> str:
    """Where one rank writes."""
    return f"__{rank}_0.distcp"


def plan_file(
    plan: SavePlan, planner: SavePlanner, blobs: BlobPlanner, room_for: Callable[[int, int], int] | None = None
) -> tuple[Any, list[tuple[Any, Extent]]]:
    """The planned file of one rank's items, and (item, extent) for each. Resolves the items' data, without a copy.
    `room_for` says how many bytes item k has in the file, if it is an object of n bytes; it gets that long by zeros.
    """
    described: list[tuple[FilePlan, torch.Tensor | None]] = []
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
            described.append((raw_plan(raw if room_for is None else padded(raw, room_for(k, len(raw)))), None))
            if names := unknown_types(raw):
                classes[item.index.fqn] = ", ".join(names)
        else:
            tensor: torch.Tensor = data  # type: ignore[assignment]
            met.append((item.index.fqn, tensor, version_counters([tensor])[0]))
            described.append(blobs.tensor(tensor))
    if classes:
        listed = "; ".join(f"{name!r}: {kinds}" for name, kinds in list(classes.items())[:20])
        _warn_once(f"loads take these objects only with weights_only=False, which runs their classes' code: {listed}")
    state, extents = join_blobs(described, met)
    return state, list(zip(plan.items, extents, strict=True))


@lru_cache(maxsize=64)
def _warn_once(message: str) -> None:
    report(logging.WARNING, "%s", message)
