"""A plan for plain states that can be reused: torch's bytes without torch's pickler, and only changed scalars encoded again.

Guarantees:
- A cached plan keeps no tensor and no storage of the user alive.
- It is reused only where types, lengths, strings, the identity pattern, tensor facts and storage sizes are all equal;
  otherwise `match` gives None and a new plan is made.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..format.zip import Container, lay_out, with_pickle
from .compaction import dense_copy, plan_extents
from .encoder import Encoded, Written, encode, encode_scalar
from .plan import FilePlan, PlannedState, Sources, container_plan, version_counters
from .structure import NotPlainError, Structure, picker
from .tensor_columns import LiveStorages, LiveTensors, StoragePattern, TensorFacts, look_at
from .tensorkinds import TensorKind, tensor_kind
from .torch_layout import name_hash

Encode = Callable[[Structure, list[Any], LiveTensors, Sequence[TensorKind], Written], Encoded]


class _Scalars(NamedTuple):
    """The file as one state's scalars make it. Never changed: a later state's is another one."""

    pieces: list[bytes]
    exact: tuple[Any, ...]
    floats: array[float]
    container: Container
    plan: FilePlan


class FastPlan:
    """One structure's plan. One thread at a time; signal handlers of that thread may come in between."""

    def __init__(self, root: Any, *, alignment: int, compact_views: bool, encode: Encode = encode) -> None:
        """Plan `root` from scratch. Raises NotPlainError (or RecursionError) where torch has to do it."""
        structure = Structure(root)
        tensors = structure.pick_tensors(structure.first_leaves)
        versions = version_counters(tensors)
        live = look_at(tensors)
        kinds = list(map(tensor_kind, live.dtypes, live.devices))
        leaves = structure.finish(_constants(kinds))
        pattern = StoragePattern(live)
        _refuse_two_dtypes(pattern, kinds)
        extents = plan_extents(live, pattern, compact_views=compact_views)
        written = Written(extents.offsets, extents.strides, pattern.storage_of, extents.nbytes)
        encoded = encode(structure, leaves, live, kinds, written)
        self.structure = structure
        self.tensor_kinds = frozenset(zip(map(type, live.tensors), live.dtypes, live.devices, strict=True))
        self._pattern = pattern
        self._facts = TensorFacts(live)
        self._devices = frozenset(live.devices)
        self._exact_pieces = [encoded.piece_of[position] for position in structure.exact_positions]
        self._float_pieces = [encoded.piece_of[position] for position in structure.float_positions]
        self._storage_nbytes = [extents.nbytes[storage] for storage in encoded.key_order]
        filled = [storage for storage in encoded.key_order if extents.nbytes[storage]]
        self._copied = [(position, extents.copied[storage]) for position, storage in enumerate(filled) if storage in extents.copied]
        self._pick_sources = picker([pattern.distinct[storage] for storage in filled])
        self._pick_addresses = picker(filled)
        self._source_offsets = [extents.starts[storage] for storage in filled]
        self._source_nbytes = [extents.nbytes[storage] for storage in filled]
        container = lay_out(
            b"".join(encoded.pieces), self._storage_nbytes, name_hash=name_hash(len(encoded.key_order)), alignment=alignment
        )
        exact, floats = structure.pick_exact(leaves), array("d", structure.pick_floats(leaves))
        self._scalars = _Scalars(encoded.pieces, exact, floats, container, container_plan(container, "fast"))
        self.first = self._planned(self._scalars.plan, leaves, tensors, versions, live, cached=False)

    @property
    def container(self) -> Container:
        """The file as it was written last."""
        return self._scalars.container

    def take_first(self) -> PlannedState:
        """The planned state this was made from; can be taken once, so that nothing of it is kept."""
        first = self.first
        del self.first
        return first

    def match(self, root: Any) -> PlannedState | None:
        """The plan of `root` if it has the same structure, else None. About 1 us per tensor."""
        leaves = self.structure.match(root)
        if leaves is None:
            return None
        tensors = self.structure.pick_tensors(leaves)
        # Read at once: a change from here on is seen as torn.
        versions = version_counters(tensors)
        live = self._facts.storages_if_same(tensors)
        if live is None or not self._pattern.matches(live):
            return None
        # One assignment: a signal handler may raise, or save by this very plan, before it or after it.
        scalars = self._scalars = self._with_scalars(self._scalars, leaves)
        return self._planned(scalars.plan, leaves, tensors, versions, live, cached=True)

    def _with_scalars(self, before: _Scalars, leaves: list[Any]) -> _Scalars:
        """`before` with the scalars of `leaves`; `before` itself where all are equal."""
        exact = self.structure.pick_exact(leaves)
        floats = array("d", self.structure.pick_floats(leaves))
        # Floats are compared as bytes: 0.0 == -0.0 and nan != nan would mislead.
        if exact == before.exact and floats.tobytes() == before.floats.tobytes():
            return before
        pieces = list(before.pieces)
        for piece, old, new in zip(self._exact_pieces, before.exact, exact, strict=True):
            if old != new:
                pieces[piece] = encode_scalar(new)
        for index, piece in enumerate(self._float_pieces):
            if floats[index : index + 1].tobytes() != before.floats[index : index + 1].tobytes():
                pieces[piece] = encode_scalar(floats[index])
        container = with_pickle(before.container, b"".join(pieces), self._storage_nbytes)
        moved = container.payload_offsets is not before.container.payload_offsets
        return _Scalars(pieces, exact, floats, container, container_plan(container, "fast", None if moved else before.plan.plan_hash))

    def _planned(
        self,
        plan: FilePlan,
        leaves: list[Any],
        tensors: Sequence[torch.Tensor],
        versions: list[int | None],
        live: LiveStorages,
        *,
        cached: bool,
    ) -> PlannedState:
        structure = self.structure

        def paths() -> list[str]:
            all_paths = structure.paths(leaves)
            return [all_paths[position] for position in structure.tensor_positions]

        storages, ids = list(self._pick_sources(live.storages)), list(self._pick_sources(live.storage_ids))
        addresses = list(self._pick_addresses(live.addresses))
        for position, tensor_index in self._copied:
            storages[position] = dense_copy(tensors[tensor_index])
            ids[position], addresses[position] = storages[position]._cdata, storages[position].data_ptr()
        return PlannedState(
            plan=plan,
            sources=Sources(storages, self._source_offsets, self._source_nbytes, ids, self._devices, addresses),
            tensors=list(tensors),
            versions=versions,
            cached=cached,
            _paths=paths,
        )


def _constants(kinds: Sequence[TensorKind]) -> tuple[str, ...]:
    constants: dict[int, str] = {}
    for kind in set(kinds):
        constants[id(kind.marker)] = kind.marker
        if not kind.fresh_location:
            constants[id(kind.location)] = kind.location
    return tuple(constants.values())


def _refuse_two_dtypes(pattern: StoragePattern, kinds: Sequence[TensorKind]) -> None:
    # torch refuses it; its own path then says so.
    class_of: dict[int, bytes] = {}
    for storage, kind in zip(pattern.storage_of, kinds, strict=True):
        if class_of.setdefault(storage, kind.storage_class) != kind.storage_class and pattern.nbytes[storage]:
            raise NotPlainError("one storage viewed as two dtypes")
