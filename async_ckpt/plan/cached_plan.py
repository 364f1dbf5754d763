"""A plan for plain states that can be reused: torch's own bytes, with only the changed scalars put in.

The pickle that torch has written is read once, by the one reader, and gone through beside the state's flat list: a
container's or an object's parts follow each other in both in the same order. What pickle writes of an int, a float, a
boolean or None depends on nothing around it, nor does what it writes of a list of these: both come from `pickle`
itself. So nothing here knows how a pickle is encoded.

Guarantees:
- A cached plan keeps no tensor and no storage of the user alive.
- It is reused only where types, lengths, strings, the identity pattern, tensor facts and storage sizes are all equal;
  otherwise `match` gives None and torch is asked anew.
"""

from __future__ import annotations

import pickle
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch

from ..format.inert import Inert, MalformedPickleError, Placed, key_value
from ..format.pickles import PickleReader
from ..format.zip import with_pickle
from .key_paths import paths_of
from .object_parts import LATIN1
from .plan import FilePlan, PlannedState, container_plan, version_counters
from .strided import Strided
from .structure import NotPlainError, Opened, Structure, picker
from .tensor_columns import Live, TensorFacts, look_at
from .torch_layout import Recorded

Site = tuple[int, int]
"""Half-open range of the pickle's bytes."""


def written(value: Any) -> bytes:
    """What pickle writes of a scalar, of the text that bytes become, or of the items of a list or tuple of scalars."""
    if type(value) is bytes:
        return pickle.dumps(value.decode(LATIN1), 2)[2:-3]
    dumped = pickle.dumps(value, 2)
    if type(value) is list:
        return dumped[5:-1]
    return dumped[2:-3] if type(value) is tuple else dumped[2:-1]


class Draft:
    """What is known of a plain state before torch has written it: the versions of its tensors are read now."""

    def __init__(self, root: Any) -> None:
        """Raises NotPlainError (or RecursionError) where only torch knows what becomes of `root`."""
        self.structure = Structure(root)
        tensors = self.structure.pick_tensors(self.structure.first_leaves)
        self.versions = version_counters(tensors)
        self.live, columns = look_at(tensors)
        self.devices = frozenset(columns.devices)
        self.facts = TensorFacts(self.live, columns)

    def alone(self) -> frozenset[int]:
        """The tensors, by identity, that share their storage with no other."""
        num_views = Counter(self.live.storage_ids)
        views = zip(self.live.tensors, self.live.storage_ids, strict=True)
        return frozenset(id(tensor) for tensor, storage in views if num_views[storage] == 1)

    def parts(self, recorded: Recorded) -> list[tuple[int, int, Strided | None]]:
        """For each storage key the storage, the byte of it that what is written begins at, and how that lies there.

        Raises NotPlainError where torch has met other storages than those of the tensors, or they have changed.
        """
        storage_of = {self.live.storage_ids[index]: storage for storage, index in enumerate(self.facts.distinct)}
        parts = []
        for written_storage in recorded.storages:
            storage, start, strided = recorded.part_of(written_storage)
            known = storage_of.get(storage._cdata)
            if known is None or storage.nbytes() != self.facts.nbytes[known]:
                raise NotPlainError("torch writes storages that are no tensor's")
            parts.append((known, start, strided))
        return parts


class _Scalars(NamedTuple):
    """The file as one state's scalars make it. Never changed: a later state's is another one."""

    told: list[Any]
    """What tells whether a scalar is the same: of a float its bits, of a run what pickle writes of it."""
    pieces: list[bytes]
    """The pieces of the pickle; every second one is a scalar's."""
    plan: FilePlan


class CachedPlan:
    """One structure's plan. One thread at a time; signal handlers of that thread may come in between."""

    def __init__(self, draft: Draft, recorded: Recorded) -> None:
        """Raises NotPlainError where it is not certain which bytes of the pickle are whose."""
        self.structure = structure = draft.structure
        parts = draft.parts(recorded)
        leaves = structure.finish(_constants(recorded), draft.alone())
        sites, self.names = find_sites(structure, leaves, recorded.pickled)
        told = self._told(leaves)
        if told is None:
            raise NotPlainError("the state has changed meanwhile")
        self._facts = draft.facts
        self._devices = draft.devices
        self._storage_nbytes = [storage.nbytes() for storage in recorded.storages]
        filled = [part for part, nbytes in zip(parts, self._storage_nbytes, strict=True) if nbytes]
        self._strided = {payload: strided for payload, (_, _, strided) in enumerate(filled) if strided is not None}
        self._pick_sources = picker([draft.facts.distinct[storage] for storage, _, _ in filled])
        self._pick_addresses = picker([storage for storage, _, _ in filled])
        self._source_starts = [start for _, start, _ in filled]
        order = sorted(range(len(sites)), key=sites.__getitem__)
        self._piece_of = {index: 2 * number + 1 for number, index in enumerate(order)}
        """The piece of each scalar."""
        edges = [0, *chain.from_iterable(sites[index] for index in order), len(recorded.pickled)]
        pieces = [recorded.pickled[start:end] for start, end in pairwise(edges)]
        self._scalars = _Scalars(told, pieces, container_plan(recorded.container, "fast", self._strided))

    def first(self, root: Any, draft: Draft) -> PlannedState:
        """The plan of the state that this was made of."""
        return self._planned(self._scalars.plan, root, draft.versions, draft.live, cached=False)

    def match(self, root: Any) -> PlannedState | None:
        """The plan of `root` if it has the same structure, else None. About 1 us per tensor."""
        leaves = self.structure.match(root)
        if leaves is None:
            return None
        tensors = self.structure.pick_tensors(leaves)
        # Read at once: a change from here on is seen as torn.
        versions = version_counters(tensors)
        live = self._facts.match(tensors)
        told = self._told(leaves)
        if live is None or told is None:
            return None
        # One assignment: a signal handler may raise, or save by this very plan, before it or after it.
        scalars = self._scalars = self._with_scalars(self._scalars, leaves, told)
        return self._planned(scalars.plan, root, versions, live, cached=True)

    def _told(self, leaves: list[Any]) -> list[Any] | None:
        scalars = self.structure.scalars(leaves)
        if scalars is None:
            return None
        exact, floats, runs = scalars
        # Not as numbers: 0.0 == -0.0 and nan != nan would mislead.
        return [*exact, *array("q", array("d", floats).tobytes()), *map(written, runs)]

    def _with_scalars(self, before: _Scalars, leaves: list[Any], told: list[Any]) -> _Scalars:
        """`before` with the scalars of `leaves`; `before` itself where all are equal."""
        if told == before.told:
            return before
        pieces = list(before.pieces)
        for index, (old, new) in enumerate(zip(before.told, told, strict=True)):
            if old != new:
                leaf = leaves[self.structure.scalar_positions[index]]
                pieces[self._piece_of[index]] = new if type(leaf) in (list, tuple) else written(leaf)
        plan = with_pickle(before.plan, b"".join(pieces), self._storage_nbytes)
        # Where payloads had to move, it is laid out anew.
        plan = plan if isinstance(plan, FilePlan) else container_plan(plan, "fast", self._strided)
        return _Scalars(told, pieces, plan)

    def _planned(
        self, plan: FilePlan, root: Any, versions: list[int | None], live: Live, *, cached: bool
    ) -> PlannedState:
        tensors = live.tensors
        return PlannedState(
            plan=plan,
            storages=list(self._pick_sources(live.storages)),
            starts=self._source_starts,
            storage_ids=list(self._pick_sources(live.storage_ids)),
            devices=self._devices,
            tensors=tensors,
            versions=versions,
            tensor_paths=lambda: paths_of(root, tensors),
            cached=cached,
            addresses=list(self._pick_addresses(live.addresses)),
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


def find_sites(structure: Structure, leaves: Sequence[Any], pickled: bytes) -> tuple[list[Site], frozenset[str]]:
    """Where in `pickled` each scalar of `leaves` stands, in the order of `Structure.scalar_positions`, and the names of
    the classes and functions there. About 5 us per tensor.

    Raises:
        NotPlainError: some scalar's place is not certain.
    """
    reader = PickleReader(pickled, places=True)
    try:
        nodes: list[Any] = [reader.read(), *(None for _ in leaves[1:])]
        for item in structure.opened:
            children = _children(item, nodes[item.position])
            nodes[item.first : item.first + len(children)] = children
    except (MalformedPickleError, LookupError, AttributeError, TypeError, ValueError) as error:
        raise NotPlainError(f"the pickle is not built as the state is: {error}") from error
    for position in structure.string_positions:
        if type(nodes[position]) is not Placed or nodes[position].value != leaves[position]:
            raise NotPlainError("a text is not where it should be")
    sites = [_site(nodes[position]) for position in structure.scalar_positions]
    values = [leaves[position] for position in structure.scalar_positions]
    if any(pickled[start:end] != written(value) for (start, end), value in zip(sites, values, strict=True)):
        raise NotPlainError("a scalar is not where it should be")
    if any(before[1] > after[0] for before, after in pairwise(sorted(sites))):
        raise NotPlainError("two scalars in one place")
    return sites, frozenset(reader.names)


def _children(item: Opened, node: Any) -> list[Any]:
    """The parts of `node` in the order of the flat list. Raises ValueError or its like where it has others."""
    form, kind = item.form, item.kind
    if form is not None:
        called = [None, *node.args] if form.is_new else [None, node.args]
        items, pairs = node.items or [], node.pairs or {}
        if (len(called), len(items), len(pairs)) == (form.num_called, form.num_items, form.num_pairs):
            state = [node.state] if form.has_state else []
            return [*called, *state, *items, *map(key_value, pairs), *pairs.values()]
    elif kind in (dict, OrderedDict):
        if type(node) is kind and len(node) == item.length:
            attributes = [vars(node)["state"]] if item.attributes >= 0 else []
            return [*map(key_value, node), *node.values(), *attributes]
    else:
        if kind is torch.Size:
            (node,) = node.args
        if type(node) is (list if kind is list else tuple) and len(node) == item.length:
            return list(node)
    raise ValueError("a part of another kind or length")


def _site(node: Any) -> Site:
    """Of a list or tuple, with the mark before the first item and the opcode behind the last."""
    if type(node) is Inert and node.name == "_codecs.encode":
        node = node.args[0]
    if type(node) is Placed:
        return node.start, node.end
    if type(node) not in (list, tuple) or not node or not all(type(part) is Placed for part in node):
        raise NotPlainError("a scalar that the pickle makes out of something else")
    return node[0].start - 1, node[-1].end + 1
