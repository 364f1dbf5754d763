"""What a plan is: the bytes of one file as data, and the storages its payloads come from."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

from ..format.sealer import Sealer
from ..format.zip import Container
from .strided import Strided

if TYPE_CHECKING:
    import torch

_version_of = attrgetter("_version")

FileFormat = Literal["torch", "safetensors", "opaque"]
PlannerName = Literal["fast", "torch", "safetensors", "opaque"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan(Container):
    """One file, laid out. Keeps no tensor alive."""

    format: FileFormat
    planner: PlannerName
    """"fast": torch's own bytes, whose scalars can be patched for a later state; "torch": torch is asked for each
    state.
    """
    plan_hash: str = ""
    """Equal for files with the same format and the same payload extents."""
    strided: Mapping[int, Strided] = field(repr=False, default_factory=dict)
    """By number, the payloads whose bytes do not lie one behind the other."""

    def __post_init__(self) -> None:
        if not self.plan_hash:
            digest = hashlib.blake2b(f"{self.format}:{self.file_bytes}:".encode(), digest_size=8)
            digest.update(array("Q", self.payload_offsets).tobytes())
            digest.update(array("Q", self.payload_nbytes).tobytes())
            object.__setattr__(self, "plan_hash", digest.hexdigest())

    def sealer(self) -> Sealer:
        """A fresh sealer for one written file."""
        return Sealer(self)


@dataclass(slots=True)
class PlannedState:
    """A plan and the live storages to fill it from. Drop it when the copy is done: it keeps the tensors alive.

    One storage per payload, in file order, as parallel lists (a loop over 10,000 small objects costs more than the
    copies).
    """

    plan: FilePlan
    storages: Sequence[torch.UntypedStorage]
    starts: Sequence[int]
    """The first byte of each payload in its storage."""
    storage_ids: Sequence[int]
    """What tells the storages apart (`_cdata`)."""
    devices: frozenset[torch.device]
    """At least those of the storages."""
    tensors: Sequence[torch.Tensor]
    """Every tensor object met, each once; their version counters tell whether a snapshot is torn."""
    versions: list[int | None] = field(repr=False)
    """The counters when the planner met the tensors, before anything of them was copied."""
    tensor_paths: Callable[[], list[str]] = field(repr=False)
    """Gives the key path of each of `tensors`, such as "['model']['layer.0.weight']"."""
    cached: bool = False
    """True where an earlier plan was reused."""
    addresses: list[int] = field(repr=False, default_factory=list)
    """Where the bytes of each storage lay while it was planned, at full length; empty where the planner has not
    looked.
    """
    tensor_storages: list[int] = field(repr=False, default_factory=list)
    """`_cdata` of the storage of each of `tensors`; empty where the planner has not looked."""


def planned_state(
    plan: FilePlan,
    storages: Sequence[torch.UntypedStorage],
    starts: Sequence[int],
    tensors: Sequence[torch.Tensor],
    versions: list[int | None],
    tensor_paths: Callable[[], list[str]],
) -> PlannedState:
    """As `PlannedState`, for planners that have not looked at the storages."""
    ids = [storage._cdata for storage in storages]
    devices = frozenset(storage.device for storage in storages)
    return PlannedState(plan, storages, starts, ids, devices, tensors, versions, tensor_paths)


def version_counters(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """Version counter of each tensor; None for one that keeps none, as a tensor made in inference mode does."""
    try:
        return list(map(_version_of, tensors))
    except RuntimeError:
        return list(map(_version_or_none, tensors))


def _version_or_none(tensor: torch.Tensor) -> int | None:
    # `is_inference` is no question to ask: a module that was converted since says no, and an uninitialised tensor
    # refuses to answer.
    try:
        return tensor._version
    except RuntimeError:
        return None


def container_plan(container: Container, planner: PlannerName, strided: Mapping[int, Strided]) -> FilePlan:
    facts = {fact.name: getattr(container, fact.name) for fact in fields(Container)}
    return FilePlan(**facts, format="torch", planner=planner, strided=strided)


def opaque_state(data: bytes) -> PlannedState:
    """The plan of a file that holds exactly `data`: what somebody else made (a configuration, a tokenizer)."""
    plan = FilePlan(len(data), ((0, data),), (), (), format="opaque", planner="opaque")
    return planned_state(plan, [], [], [], [], list)
