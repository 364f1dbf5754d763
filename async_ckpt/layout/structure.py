"""The shape of a state made of plain containers, as data: flat lists that a later state can be compared with at C speed.

A state is flattened breadth first: position 0 is the root, every container adds its children behind those before it (a dict its keys,
then its values; an OrderedDict also its instance `__dict__`). A container met again adds nothing. Pickle remembers objects by identity,
so besides types, lengths and strings the pattern of which positions hold the same object belongs to the structure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

CONTAINER_TYPES = (dict, OrderedDict, list, tuple)
TENSOR_TYPES = (torch.Tensor, torch.nn.Parameter)
_EXACT_TYPES = (int, bool, type(None))
_ALL_TYPES = frozenset((*CONTAINER_TYPES, *TENSOR_TYPES, *_EXACT_TYPES, float, str))

SINGLE_CHARACTER_KEYS = tuple(str(number) for number in range(10))
"""Storage keys that the interpreter shares with equal strings of the user; longer ones are always fresh objects."""


class NotPlainError(Exception):
    """The state holds something the fast encoder leaves to torch."""


def picker(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """`itemgetter` that gives a tuple for no and one position too."""
    if not positions:
        return lambda items: ()
    if len(positions) == 1:
        only = positions[0]
        return lambda items: (items[only],)
    return itemgetter(*positions)


class SharingPattern:
    """Which of a row of objects are the same object, without keeping any of them."""

    __slots__ = ("_pick_firsts", "_pick_repeats", "num_distinct")

    def __init__(self, ids: Sequence[int]) -> None:
        first: dict[int, int] = {}
        repeats: list[tuple[int, int]] = []
        for position, value in enumerate(ids):
            before = first.setdefault(value, position)
            if before != position:
                repeats.append((position, before))
        self._pick_repeats = picker([position for position, _ in repeats])
        self._pick_firsts = picker([before for _, before in repeats])
        self.num_distinct = len(first)

    def matches(self, ids: Sequence[int]) -> bool:
        """True where `ids` fall into the same groups: every repeat equals its first, and no two groups have become one."""
        return self._pick_repeats(ids) == self._pick_firsts(ids) and len(set(ids)) == self.num_distinct


@dataclass(frozen=True, slots=True)
class Opened:
    """A container whose children are in the flat list: `count` items from `first`, then `attributes` (OrderedDict's dict) or -1."""

    position: int
    kind: type
    count: int
    first: int
    attributes: int


class Structure:
    """What must be the same for a plan to be reused. Holds strings and numbers of the user, never tensors."""

    def __init__(self, root: Any) -> None:
        leaves, opened = _flatten(root)
        self.first_leaves = leaves
        self.opened = opened
        self.types = list(map(type, leaves))
        tensors: dict[int, int] = {}
        exact: list[int] = []
        floats: list[int] = []
        strings: list[int] = []
        remembered: list[int] = []
        for position, kind in enumerate(self.types):
            if kind is float:
                floats.append(position)
            elif kind in _EXACT_TYPES:
                exact.append(position)
            else:
                remembered.append(position)
                if kind is str:
                    strings.append(position)
                elif kind in TENSOR_TYPES:
                    tensors.setdefault(id(leaves[position]), position)
        self.exact_positions = exact
        self.float_positions = floats
        self.tensor_positions = list(tensors.values())
        self.pick_exact = picker(exact)
        self.pick_floats = picker(floats)
        self.pick_tensors = picker(self.tensor_positions)
        self._pick_strings = picker(strings)
        self._pick_remembered = picker(remembered)
        self._strings = self._pick_strings(leaves)
        self._constants: tuple[str, ...] = ()
        self._sharing = SharingPattern(())
        self._walk_plan = [(item.position, item.kind, item.count, item.attributes >= 0) for item in opened]

    def _remembered_ids(self, leaves: list[Any]) -> list[int]:
        ids = list(map(id, self._pick_remembered(leaves)))
        ids.extend(map(id, self._constants))
        return ids

    def finish(self, constants: tuple[str, ...]) -> list[Any]:
        """Note the sharing pattern; returns the flat list of the first state and from now on keeps none of its objects.

        `constants`: strings that torch itself pickles. A user's equal string may or may not be the same object.
        """
        leaves, self.first_leaves = self.first_leaves, []
        self._constants = (*constants, *SINGLE_CHARACTER_KEYS)
        self._sharing = SharingPattern(self._remembered_ids(leaves))
        return leaves

    def paths(self, leaves: list[Any]) -> list[str]:
        """The key path of every position, for messages."""
        paths = [""] * len(leaves)
        for item in self.opened:
            prefix = paths[item.position]
            is_sequence = item.kind is list or item.kind is tuple
            for index in range(item.count):
                if is_sequence:
                    paths[item.first + index] = f"{prefix}[{index}]"
                else:
                    paths[item.first + item.count + index] = f"{prefix}[{leaves[item.first + index]!r}]"
            if item.attributes >= 0:
                paths[item.attributes] = f"{prefix}.__dict__"
        return paths

    def match(self, root: Any) -> list[Any] | None:
        """The flat list of `root` if it has this structure, else None. Scalars may differ."""
        leaves = [root]
        append, extend = leaves.append, leaves.extend
        container: Any
        for position, kind, count, has_attributes in self._walk_plan:
            container = leaves[position]
            actual: type = type(container)
            if actual is not kind or len(container) != count:
                return None
            extend(container)
            if kind is dict:
                extend(container.values())
            elif kind is OrderedDict:
                extend(container.values())
                attributes = vars(container)
                if bool(attributes) is not has_attributes:
                    return None
                if has_attributes:
                    append(attributes)
        if list(map(type, leaves)) != self.types or self._pick_strings(leaves) != self._strings:
            return None
        return leaves if self._sharing.matches(self._remembered_ids(leaves)) else None


def _flatten(root: Any) -> tuple[list[Any], list[Opened]]:
    leaves = [root]
    opened: list[Opened] = []
    seen: set[int] = set()
    position = 0
    while position < len(leaves):
        obj = leaves[position]
        kind = type(obj)
        if kind not in _ALL_TYPES:
            raise NotPlainError(f"holds a {kind.__qualname__}")
        if kind in CONTAINER_TYPES and id(obj) not in seen:
            seen.add(id(obj))
            first, attributes = len(leaves), -1
            leaves.extend(obj)
            if kind is dict or kind is OrderedDict:
                leaves.extend(obj.values())
            if kind is OrderedDict and vars(obj):
                attributes = len(leaves)
                leaves.append(vars(obj))
            opened.append(Opened(position, kind, len(obj), first, attributes))
        position += 1
    return leaves, opened
