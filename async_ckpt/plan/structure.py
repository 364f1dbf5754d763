"""The shape of a plain state, as data: flat lists that a later state can be compared with at C speed.

A state is flattened breadth first: position 0 is the root, every container adds its children behind those before it (a
dict its keys, then its values; an OrderedDict also its instance `__dict__`; any other object the parts that pickle
would take it to). A container met again adds nothing. Pickle remembers objects by identity, so besides types, lengths
and strings the pattern of which positions hold the same object belongs to the structure.
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch

from .object_parts import (
    LATIN1,
    MAX_BLOB_BYTES,
    Form,
    NotPlainError,
    expand,
    global_opcode,
    is_global,
    is_still_global,
)

__all__ = ["NotPlainError", "Opened", "SharingPattern", "Structure", "picker"]

CONTAINER_TYPES = (dict, OrderedDict, list, tuple, torch.Size)
TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)
_EXACT_TYPES = (int, bool, type(None))
_SCALAR_TYPES = frozenset((*_EXACT_TYPES, float))
_ALL_TYPES = frozenset((*CONTAINER_TYPES, *TENSOR_TYPES, *_EXACT_TYPES, float, str))

MIN_RUN = 16
"""From so many items on, a list or tuple of nothing but scalars is a leaf: its length may change, as a loss history's
does.
"""

SINGLE_CHARACTER_KEYS = tuple(str(number) for number in range(10))
"""Storage keys that the interpreter shares with equal strings of the user; longer ones are always fresh objects."""


_MAX_LOOSE_LEAVES = 50_000
_MAX_LEAVES_PER_TENSOR = 20


class LooseStateError(NotPlainError):
    """So many more small objects than tensors that comparing them is dearer than to have them written again."""


def is_run(obj: Any) -> bool:
    """Whether `obj`, a list or tuple, is a leaf: long, and of scalars alone."""
    return len(obj) >= MIN_RUN and _SCALAR_TYPES.issuperset(map(type, obj))


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], Sequence[Any]]:
    """`itemgetter` that gives a sequence for no and one position too."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return itemgetter(slice(positions[0], positions[0] + 1) if positions else slice(0))


class SharingPattern:
    """Which of a row of objects are the same object, without keeping any of them."""

    __slots__ = ("_ids", "_pick_firsts", "_pick_repeats", "firsts")

    def __init__(self, ids: Sequence[int]) -> None:
        first: dict[int, int] = {}
        repeats: list[tuple[int, int]] = []
        for position, value in enumerate(ids):
            before = first.setdefault(value, position)
            if before != position:
                repeats.append((position, before))
        self._pick_repeats = picker([position for position, _ in repeats])
        self._pick_firsts = picker([before for _, before in repeats])
        self.firsts = list(first.values())
        """The position of each different object, in order of first appearance."""
        self._ids = ids

    def matches(self, ids: Sequence[int]) -> bool:
        """True where `ids` fall into the same groups: every repeat equals its first, and no two groups have
        become one.
        """
        if ids == self._ids:
            return True
        matches = self._pick_repeats(ids) == self._pick_firsts(ids) and len(set(ids)) == len(self.firsts)
        self._ids = ids if matches else self._ids
        return matches


class Opened(NamedTuple):
    """A container whose children are in the flat list: `length` items from `first`, then `attributes` (OrderedDict's
    dict) or -1.
    """

    position: int
    kind: type
    length: int
    first: int
    attributes: int
    form: Form | None = None
    """How the children make up an object that is no plain container; `length` is their number then."""


class Structure:
    """What must be the same for a plan to be reused. Holds strings, numbers, classes and functions of the user, never
    tensors.
    """

    def __init__(self, root: Any) -> None:
        self.opened: list[Opened] = []
        self.global_opcodes: dict[int, bytes] = {}
        """By identity: objects that pickle writes by name."""
        self.first_leaves = leaves = [root]
        all_runs = self._flatten(leaves)
        self.types = list(map(type, leaves))
        exact: list[int] = []
        floats: list[int] = []
        strings: list[int] = []
        tensors: list[int] = []
        runs: list[int] = []
        blobs: list[int] = []
        globals_: list[int] = []
        met: set[int] = set()
        for position, (kind, leaf) in enumerate(zip(self.types, leaves, strict=True)):
            if kind is float:
                floats.append(position)
            elif kind in _EXACT_TYPES:
                exact.append(position)
            elif kind is str:
                strings.append(position)
            elif id(leaf) not in met:
                met.add(id(leaf))
                if kind in TENSOR_TYPES:
                    tensors.append(position)
                elif id(leaf) in all_runs:
                    runs.append(position)
                elif kind is bytes and len(leaf) > 1:
                    blobs.append(position)
                elif id(leaf) in self.global_opcodes:
                    globals_.append(position)
        if len(leaves) > max(_MAX_LOOSE_LEAVES, _MAX_LEAVES_PER_TENSOR * len(tensors)):
            raise LooseStateError(f"{len(leaves)} parts and {len(tensors)} tensors")
        # The content of bytes may change like a number's; which of them are the same object may not.
        exact += blobs
        self.scalar_positions = [*exact, *floats, *runs]
        self.string_positions = strings
        self.pick_tensors = picker(tensors)
        self._pick_exact, self._pick_floats, self._pick_runs = picker(exact), picker(floats), picker(runs)
        self._pick_strings, self._pick_blobs, self._pick_globals = picker(strings), picker(blobs), picker(globals_)
        self._strings = self._pick_strings(leaves)
        self._globals = self._pick_globals(leaves)
        if sum(map(len, self._pick_blobs(leaves))) > MAX_BLOB_BYTES:
            raise NotPlainError("holds large bytes objects")
        if bytes in self.types and any(text == LATIN1 and text is not LATIN1 for text in self._strings):
            raise NotPlainError("a string that pickle may or may not take for its own")

    def _flatten(self, leaves: list[Any]) -> set[int]:
        """Add what is below the first of `leaves`, which grow meanwhile; returns the runs in it, by identity."""
        runs: set[int] = set()
        seen: set[int] = set()
        for position, obj in enumerate(leaves):
            kind = type(obj)
            if (kind in _ALL_TYPES and kind not in CONTAINER_TYPES) or id(obj) in seen:
                continue
            first, attributes = len(leaves), -1
            if kind not in CONTAINER_TYPES:
                if not self._is_leaf(obj):
                    seen.add(id(obj))
                    form, parts = expand(obj)
                    leaves.extend(parts)
                    self.opened.append(Opened(position, kind, len(parts), first, -1, form))
                continue
            seen.add(id(obj))
            if kind in (list, tuple) and is_run(obj):
                runs.add(id(obj))
                continue
            leaves.extend(obj)
            if kind is dict or kind is OrderedDict:
                leaves.extend(obj.values())
            if kind is OrderedDict and vars(obj):
                attributes = len(leaves)
                leaves.append(vars(obj))
            self.opened.append(Opened(position, kind, len(obj), first, attributes))
        return runs

    def _is_leaf(self, obj: Any) -> bool:
        if is_global(obj):
            if id(obj) not in self.global_opcodes:
                self.global_opcodes[id(obj)] = global_opcode(obj)
            return True
        return type(obj) is bytes and len(obj) > 1

    def finish(self, constants: tuple[str, ...], alone: frozenset[int]) -> list[Any]:
        """Note the sharing pattern; returns the flat list of the first state and from now on keeps none of its objects.

        Args:
            constants: strings that torch itself pickles. A user's equal string may or may not be the same object.
            alone: tensors, by identity, that share their storage with no other: so must those in their places, and
                are then other objects than the rest.
        """
        leaves, self.first_leaves = self.first_leaves, []
        self._constants = (*constants, LATIN1, *SINGLE_CHARACTER_KEYS)
        # Strings of different values are different objects too, so most of a state's need not be looked at.
        num_equal = Counter({id(text): text for text in (*self._constants, *self._strings)}.values())
        remembered = [position for position, kind in enumerate(self.types) if kind not in _SCALAR_TYPES]
        times_met = Counter(map(id, (*self._constants, *map(leaves.__getitem__, remembered))))

        def may_be_another(leaf: Any) -> bool:
            is_alone = num_equal[leaf] == 1 if type(leaf) is str else id(leaf) in alone
            return times_met[id(leaf)] > 1 or not is_alone

        self._pick_remembered = picker([position for position in remembered if may_be_another(leaves[position])])
        self._sharing = SharingPattern(list(map(id, (*self._pick_remembered(leaves), *self._constants))))
        return leaves

    def scalars(self, leaves: list[Any]) -> tuple[list[Any], list[Any], list[Any]] | None:
        """What may change from state to state, in the order of `scalar_positions`: numbers and bytes, floats, copies of
        lists (or the tuples) of scalars. None where one of these holds something else by now.
        """
        copies = [run[:] for run in self._pick_runs(leaves)]
        if not all(map(is_run, copies)):
            return None
        return list(self._pick_exact(leaves)), list(self._pick_floats(leaves)), copies

    def match(self, root: Any) -> list[Any] | None:
        """The flat list of `root` if it has this structure, else None. Scalars may differ."""
        leaves = [root]
        append, extend = leaves.append, leaves.extend
        container: Any
        for position, kind, count, _, attributes_at, form in self.opened:
            container = leaves[position]
            actual: type = type(container)
            if actual is not kind:
                return None
            if form is not None:
                try:
                    found, parts = expand(container)
                except NotPlainError:
                    return None
                if found != form:
                    return None
                extend(parts)
                continue
            if len(container) != count:
                return None
            extend(container)
            if kind is dict:
                extend(container.values())
            elif kind is OrderedDict:
                extend(container.values())
                attributes = vars(container)
                if bool(attributes) is not (attributes_at >= 0):
                    return None
                if attributes:
                    append(attributes)
        if list(map(type, leaves)) != self.types or self._pick_strings(leaves) != self._strings:
            return None
        if not self._sharing.matches(list(map(id, (*self._pick_remembered(leaves), *self._constants)))):
            return None
        named, opcodes = self._pick_globals(leaves), self.global_opcodes
        is_same = (
            all(map(operator.is_, named, self._globals))
            and all(is_still_global(obj, opcodes[id(obj)]) for obj in named)
            and all(len(blob) > 1 for blob in self._pick_blobs(leaves))
        )
        return leaves if is_same else None
