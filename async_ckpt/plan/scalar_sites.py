"""Where each scalar of a state stands in the pickle that torch has written of it, so that a later one can be put in its
place.

The pickle is read once, by the one reader, and gone through beside the state's flat list: a container's or an object's
parts follow each other in both in the same order. What pickle writes of an int, a float, a boolean or None depends on
nothing around it, nor does what it writes of a list of these: both come from `pickle` itself. So nothing here knows how
a pickle is encoded.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from ..format.inert import Inert, MalformedPickleError, Placed, key_value
from ..format.pickles import PickleReader
from .object_parts import LATIN1, NotPlainError
from .structure import Opened, Structure

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


def find_sites(structure: Structure, leaves: Sequence[Any], pickled: bytes) -> tuple[list[Site], frozenset[str]]:
    """Where in `pickled` each scalar of `leaves` stands, in the order of `Structure.scalar_positions`, and the names of
    the classes and functions there. About 5 us per tensor.

    Raises:
        NotPlainError: some scalar's place is not certain.
    """
    reader = PickleReader(pickled, places=True)
    try:
        nodes = _nodes(structure, len(leaves), reader.read())
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


def _nodes(structure: Structure, num_leaves: int, root: Any) -> list[Any]:
    nodes: list[Any] = [None] * num_leaves
    nodes[0] = root
    for item in structure.opened:
        children = _children(item, nodes[item.position])
        nodes[item.first : item.first + len(children)] = children
    return nodes


def _children(item: Opened, node: Any) -> list[Any]:
    """The parts of `node` in the order of the flat list."""
    if item.form is not None:
        return _parts(item, node)
    if item.kind is torch.Size:
        (node,) = node.args
    if item.kind in (dict, OrderedDict):
        children = _checked(
            type(node) is item.kind and len(node) == item.length, [*map(key_value, node), *node.values()]
        )
        return [*children, vars(node)["state"]] if item.attributes >= 0 else children
    return _checked(type(node) is (list if item.kind is list else tuple) and len(node) == item.length, list(node))


def _parts(item: Opened, node: Any) -> list[Any]:
    form = item.form
    assert form is not None and type(node) is Inert
    args = [None, *node.args] if form.is_new else [None, node.args]
    items, pairs = node.items or [], node.pairs or {}
    is_so = (len(args), len(items), len(pairs)) == (form.num_called, form.num_items, form.num_pairs)
    state = [node.state] if form.has_state else []
    return _checked(is_so, [*args, *state, *items, *map(key_value, pairs), *pairs.values()])


def _checked(is_so: bool, children: list[Any]) -> list[Any]:
    if not is_so:
        raise ValueError("a part of another length")
    return children


def _site(node: Any) -> Site:
    """Of a list or tuple, with the mark before the first item and the opcode behind the last."""
    if type(node) is Inert and node.name == "_codecs.encode":
        node = node.args[0]
    if type(node) is Placed:
        return node.start, node.end
    if type(node) not in (list, tuple) or not node or not all(type(part) is Placed for part in node):
        raise NotPlainError("a scalar that the pickle makes out of something else")
    return node[0].start - 1, node[-1].end + 1
