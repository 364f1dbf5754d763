"""A plan for plain states that can be reused: torch's own bytes, with only the changed scalars put in.

Guarantees:
- A cached plan keeps no tensor and no storage of the user alive.
- It is reused only where types, lengths, strings, the identity pattern, tensor facts and storage sizes are all equal;
  otherwise `match` gives None and torch is asked anew.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch

from ..format.zip import Container, with_pickle
from .key_paths import tensor_paths
from .plan import FilePlan, PlannedState, container_plan, version_counters
from .scalar_sites import Sites, find_sites, written
from .strided import Strided
from .structure import NotPlainError, Structure, picker
from .tensor_columns import LiveStorages, TensorFacts, look_at
from .torch_layout import Recorded


class Draft:
    """What is known of a plain state before torch has written it: the versions of its tensors are read now."""

    def __init__(self, root: Any) -> None:
        """Raises NotPlainError (or RecursionError) where only torch knows what becomes of `root`."""
        self.structure = Structure(root)
        self.tensors = self.structure.pick_tensors(self.structure.first_leaves)
        self.versions = version_counters(self.tensors)
        self.live = look_at(self.tensors)
        self.facts = TensorFacts(self.live)

    def alone(self) -> frozenset[int]:
        """The tensors, by identity, that share their storage with no other."""
        num_views = Counter(self.live.storage_ids)
        views = zip(self.tensors, self.live.storage_ids, strict=True)
        return frozenset(id(tensor) for tensor, storage in views if num_views[storage] == 1)

    def parts(self, recorded: Recorded) -> list[tuple[int, int, Strided | None]]:
        """For each storage key the storage, the byte of it that what is written begins at, and how that lies there.

        Raises NotPlainError where torch has met other storages than those of the tensors, or they have changed.
        """
        storage_of = {self.live.storage_ids[index]: storage for storage, index in enumerate(self.facts.distinct)}
        parts = []
        for written_storage in recorded.storages:
            storage, start, strided = recorded.parts.get(written_storage._cdata, (written_storage, 0, None))
            known = storage_of.get(storage._cdata)
            if known is None or storage.nbytes() != self.facts.nbytes[known]:
                raise NotPlainError("torch writes storages that are no tensor's")
            parts.append((known, start, strided))
        return parts


class _Scalars(NamedTuple):
    """The file as one state's scalars make it. Never changed: a later state's is another one."""

    pieces: list[bytes]
    """The pieces of the pickle; every second one is a scalar's."""
    exact: Sequence[Any]
    floats: array[float]
    runs: list[bytes]
    container: Container
    plan: FilePlan


class CachedPlan:
    """One structure's plan. One thread at a time; signal handlers of that thread may come in between."""

    def __init__(self, draft: Draft, recorded: Recorded) -> None:
        """Raises NotPlainError where it is not certain which bytes of the pickle are whose."""
        structure = draft.structure
        parts = draft.parts(recorded)
        leaves = structure.finish(_constants(recorded), draft.alone())
        sites = find_sites(structure, leaves, recorded.pickled)
        runs = structure.runs(leaves)
        if runs is None:
            raise NotPlainError("the state has changed meanwhile")
        self.names = sites.names
        self.structure = structure
        self._facts = draft.facts
        self._devices = frozenset(draft.live.columns.devices)
        self._storage_nbytes = [storage.nbytes() for storage in recorded.storages]
        filled = [part for part, nbytes in zip(parts, self._storage_nbytes, strict=True) if nbytes]
        self._strided = {payload: strided for payload, (_, _, strided) in enumerate(filled) if strided is not None}
        self._pick_sources = picker([draft.facts.distinct[storage] for storage, _, _ in filled])
        self._pick_addresses = picker([storage for storage, _, _ in filled])
        self._source_starts = [start for _, start, _ in filled]
        pieces = self._cut(recorded.pickled, sites)
        exact, floats = structure.pick_exact(leaves), array("d", structure.pick_floats(leaves))
        container = recorded.container
        self._scalars = _Scalars(
            pieces, exact, floats, list(map(written, runs)), container, container_plan(container, "fast", self._strided)
        )
        self._first = self._planned(self._scalars.plan, leaves, draft.tensors, draft.versions, draft.live, cached=False)

    def _cut(self, pickled: bytes, sites: Sites) -> list[bytes]:
        found = [*sites.exact, *sites.floats, *sites.runs]
        order = sorted(range(len(found)), key=found.__getitem__)
        edges = [0, *chain.from_iterable(found[index] for index in order), len(pickled)]
        piece_of = {index: 2 * number + 1 for number, index in enumerate(order)}
        pieces = [piece_of[index] for index in range(len(found))]
        num_exact, num_floats = len(sites.exact), len(sites.floats)
        self._exact_pieces = pieces[:num_exact]
        self._float_pieces = pieces[num_exact : num_exact + num_floats]
        self._run_pieces = pieces[num_exact + num_floats :]
        return [pickled[start:end] for start, end in pairwise(edges)]

    def take_first(self) -> PlannedState:
        """The planned state this was made from; can be taken once, so that nothing of it is kept."""
        first = self._first
        del self._first
        return first

    def match(self, root: Any) -> PlannedState | None:
        """The plan of `root` if it has the same structure, else None. About 1 us per tensor."""
        leaves = self.structure.match(root)
        if leaves is None:
            return None
        tensors = self.structure.pick_tensors(leaves)
        # Read at once: a change from here on is seen as torn.
        versions = version_counters(tensors)
        live = self._facts.match(tensors)
        runs = self.structure.runs(leaves)
        if live is None or runs is None:
            return None
        # One assignment: a signal handler may raise, or save by this very plan, before it or after it.
        scalars = self._scalars = self._with_scalars(self._scalars, leaves, list(map(written, runs)))
        return self._planned(scalars.plan, leaves, tensors, versions, live, cached=True)

    def _with_scalars(self, before: _Scalars, leaves: list[Any], runs: list[bytes]) -> _Scalars:
        """`before` with the scalars of `leaves`; `before` itself where all are equal."""
        exact = self.structure.pick_exact(leaves)
        floats = array("d", self.structure.pick_floats(leaves))
        # Floats are compared as bytes: 0.0 == -0.0 and nan != nan would mislead.
        if exact == before.exact and floats.tobytes() == before.floats.tobytes() and runs == before.runs:
            return before
        pieces = list(before.pieces)
        for piece, old, new in zip(self._exact_pieces, before.exact, exact, strict=True):
            if old != new:
                pieces[piece] = written(new)
        for index, piece in enumerate(self._float_pieces):
            if floats[index : index + 1].tobytes() != before.floats[index : index + 1].tobytes():
                pieces[piece] = written(floats[index])
        for piece, run in zip(self._run_pieces, runs, strict=True):
            pieces[piece] = run
        container = with_pickle(before.container, b"".join(pieces), self._storage_nbytes)
        moved = container.payload_offsets is not before.container.payload_offsets
        plan = container_plan(container, "fast", self._strided, None if moved else before.plan.plan_hash)
        return _Scalars(pieces, exact, floats, runs, container, plan)

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
        root = leaves[0]
        storages, ids = list(self._pick_sources(live.storages)), list(self._pick_sources(live.storage_ids))
        addresses = list(self._pick_addresses(live.addresses))
        return PlannedState(
            plan=plan,
            storages=storages,
            starts=self._source_starts,
            storage_ids=ids,
            devices=self._devices,
            tensors=tensors,
            versions=versions,
            tensor_paths=lambda: tensor_paths(root, tensors),
            cached=cached,
            addresses=addresses,
            tensor_storages=live.storage_ids,
        )


def _constants(recorded: Recorded) -> tuple[str, ...]:
    """Strings of torch's own in the pickle, which a user's may be the same objects as; those made anew for each storage
    are left out.
    """
    found: dict[int, str] = {}
    asked: dict[str, str] = {}
    for storage, (marker, _, _, location, _) in zip(recorded.storages, recorded.persistent_ids, strict=True):
        found[id(marker)] = marker
        if location not in asked:
            asked[location] = torch.serialization.location_tag(storage)
        if asked[location] is location:
            found[id(location)] = location
    return tuple(found.values())
