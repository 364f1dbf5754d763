"""What a plan is: the bytes of one file as data, and the storages its payloads come from."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import TYPE_CHECKING, Literal

from ..format.sealer import Sealer
from ..format.zip import Container, SealMap

if TYPE_CHECKING:
    import torch

_version_of = attrgetter("_version")

FileFormat = Literal["torch", "safetensors", "opaque"]
PlannerName = Literal["fast", "torch", "safetensors", "opaque"]


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Every byte of a file that is not payload, and where the payloads go. Data only: keeps no tensor alive, never
    changes.
    """

    file_bytes: int
    literals: tuple[tuple[int, bytes], ...]
    """(file offset, bytes), ascending; with the payloads they tile the file. What depends on payload CRCs is zero until
    sealed.
    """
    payload_offsets: Sequence[int]
    payload_nbytes: Sequence[int]
    """Ascending, none empty, none overlapping."""
    format: FileFormat
    planner: PlannerName
    """"fast": torch's own bytes, whose scalars can be patched for a later state; "torch": torch is asked for each
    state.
    """
    plan_hash: str
    """Equal for files with the same format and the same payload extents."""
    seal_map: SealMap | None = field(repr=False, default=None)

    def sealer(self) -> Sealer:
        """A fresh sealer for one written file."""
        return Sealer(self.file_bytes, self.payload_offsets, self.payload_nbytes, self.seal_map, self.literals[-1])


@dataclass(frozen=True, slots=True)
class Source:
    """`nbytes` bytes of `storage`, from byte `offset_bytes`: one payload."""

    storage: torch.UntypedStorage
    offset_bytes: int
    nbytes: int


@dataclass(slots=True)
class Sources:
    """One source per payload, in file order, as parallel lists (a loop over 10,000 small objects costs more than the
    copies).
    """

    storage: list[torch.UntypedStorage]
    offset_bytes: list[int]
    nbytes: list[int]
    ids: list[int] = field(default_factory=list)
    """What tells the storages apart (`_cdata`); read from them where the planner has not."""
    devices: frozenset[torch.device] | None = None
    """At least those of the storages; None where the planner has not looked."""
    addresses: list[int] = field(default_factory=list)
    """Where the bytes of each storage lay while it was planned, at full length; empty where the planner has not
    looked.
    """

    def identities(self) -> list[int]:
        return self.ids or [storage._cdata for storage in self.storage]

    def all_devices(self) -> frozenset[torch.device]:
        return frozenset(storage.device for storage in self.storage) if self.devices is None else self.devices

    def __len__(self) -> int:
        return len(self.storage)

    def __getitem__(self, index: int) -> Source:
        return Source(self.storage[index], self.offset_bytes[index], self.nbytes[index])

    def __iter__(self) -> Iterator[Source]:
        return map(Source, self.storage, self.offset_bytes, self.nbytes)


@dataclass(slots=True)
class PlannedState:
    """A plan and the live storages to fill it from. Drop it when the copy is done: it keeps the tensors alive."""

    plan: FilePlan
    sources: Sources
    tensors: list[torch.Tensor]
    """Every tensor object met, each once; their version counters tell whether a snapshot is torn."""
    cached: bool
    """True where an earlier plan was reused."""
    _paths: Callable[[], list[str]] = field(repr=False)
    versions: list[int | None] = field(default_factory=list, repr=False)
    """The counters when the planner met the tensors; read now where it did not."""

    def __post_init__(self) -> None:
        if not self.versions:
            self.versions = version_counters(self.tensors)

    @property
    def num_tensors(self) -> int:
        return len(self.tensors)

    def tensor_paths(self) -> list[str]:
        """Key path of each of `tensors`, such as "['model']['layer.0.weight']"; worked out when asked for."""
        return self._paths()


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


def hash_layout(file_format: str, file_bytes: int, offsets: Sequence[int], nbytes: Sequence[int]) -> str:
    """16 hex digits that name a payload layout."""
    digest = hashlib.blake2b(f"{file_format}:{file_bytes}:".encode(), digest_size=8)
    digest.update(array("Q", offsets).tobytes())
    digest.update(array("Q", nbytes).tobytes())
    return digest.hexdigest()


def container_plan(container: Container, planner: PlannerName, plan_hash: str | None = None) -> FilePlan:
    """The plan of a torch container."""
    if plan_hash is None:
        plan_hash = hash_layout("torch", container.file_bytes, container.payload_offsets, container.payload_nbytes)
    return FilePlan(
        file_bytes=container.file_bytes,
        literals=container.literals,
        payload_offsets=container.payload_offsets,
        payload_nbytes=container.payload_nbytes,
        format="torch",
        planner=planner,
        plan_hash=plan_hash,
        seal_map=container.seal_map,
    )
