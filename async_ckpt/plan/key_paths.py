"""Names for places inside a state: "['model']['layer.0.weight']", used in messages only."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

UNKNOWN = "(inside an object)"
_MAX_STEPS = 40


def _children_of(obj: Any) -> list[tuple[str, Any]]:
    """(path step, child) of a container or of an object with attributes; nothing for leaves."""
    try:
        return list(_children(obj))
    except Exception:  # noqa: BLE001
        # A class's own `items` or property, which pickle does not call: what is inside has no name then.
        return []


def _in_brackets(key: Any) -> str:
    try:
        return f"[{key!r}]"
    except Exception:  # noqa: BLE001 - the key's own
        return f"[<{type(key).__name__}>]"


def _children(obj: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(obj, Mapping):
        for key, value in obj.items():
            yield _in_brackets(key), value
            if not isinstance(key, str):
                yield f"{_in_brackets(key)} (the key)", key
    elif isinstance(obj, (list, tuple, deque)):
        yield from ((f"[{index}]", value) for index, value in enumerate(obj))
    if type(obj) is not torch.Tensor and not isinstance(obj, (type, torch.UntypedStorage)):
        yield from ((f".{name}", value) for name, value in getattr(obj, "__dict__", {}).items())


Place = tuple[Any, str]
"""(the parent's place, the step from there); the root is (None, ""). Text is made only for the place that is asked
about.
"""


def path_of(place: Place) -> str:
    """The path as text, shortened in the middle where it is very long."""
    steps: list[str] = []
    while place[0] is not None:
        steps.append(place[1])
        place = place[0]
    if len(steps) > _MAX_STEPS:
        steps[_MAX_STEPS // 2 : -_MAX_STEPS // 2] = [" ... "]
    return "".join(reversed(steps))


def walk(root: Any) -> Iterator[tuple[Place, Any]]:
    """(place, object) of `root` and everything reachable through containers and attributes, each object once, breadth
    first.
    """
    seen = {id(root)}
    queue: deque[tuple[Place, Any]] = deque([((None, ""), root)])
    while queue:
        place, obj = queue.popleft()
        yield place, obj
        for step, child in _children_of(obj):
            if isinstance(child, (str, int, float, type(None))) or id(child) in seen:
                continue
            seen.add(id(child))
            queue.append(((place, step), child))


def paths_of(root: Any, objects: Sequence[Any]) -> list[str]:
    """The path of each object; `UNKNOWN` of one that only an object's own reducer produced."""
    wanted = {id(obj) for obj in objects}
    found = {id(obj): path_of(place) for place, obj in walk(root) if id(obj) in wanted}
    return [found.get(id(obj), UNKNOWN) for obj in objects]
