"""What a user gives to `commit`, as the plain JSON that a manifest holds. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from ..errors import UnsupportedStateError

JSON = Any
MAX_INT_DIGITS = 80
_MAX_DEPTH = 32


def check_metadata(metadata: Mapping[str, Any] | None, not_finite: dict[str, str] | None = None) -> dict[str, JSON]:
    """A deep copy of `metadata` in plain JSON types (tuples become lists), safe from later changes.

    JSON has no NaN and no infinity: where `not_finite` is given, such a number becomes null, and that says what it was.
    Raises UnsupportedStateError: something in it is not JSON; the message names where.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise UnsupportedStateError(f"metadata must be a mapping of str to JSON values, not {type(metadata).__name__}")
    return cast("dict[str, JSON]", _plain(metadata, "metadata", 0, not_finite))


def _plain(value: Any, where: str, depth: int, not_finite: dict[str, str] | None) -> JSON:
    if depth > _MAX_DEPTH:
        raise UnsupportedStateError(f"{where} is nested deeper than {_MAX_DEPTH} levels; nothing was committed")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if abs(value) >= 10**MAX_INT_DIGITS:
            raise UnsupportedStateError(
                f"{where} is an integer of more than {MAX_INT_DIGITS} digits; nothing was committed"
            )
        return int(value)
    if isinstance(value, float):
        if not_finite is not None and not math.isfinite(value):
            not_finite[where] = str(float(value))
            return None
        return float(value)
    if isinstance(value, str):
        # Not str(value): an enum's str() is its label.
        return str.__str__(value)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise UnsupportedStateError(f"{where} has the key {key!r}; JSON keys are str; nothing was committed")
        return {
            str.__str__(key): _plain(item, f"{where}[{key!r}]", depth + 1, not_finite) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{index}]", depth + 1, not_finite) for index, item in enumerate(value)]
    hint = "; call .item() for a number" if hasattr(value, "item") else ""
    raise UnsupportedStateError(
        f"{where} is a {type(value).__qualname__}, which is not JSON{hint}; nothing was committed"
    )


def with_not_finite(value: JSON, not_finite: Mapping[str, str], where: str = "metadata") -> JSON:
    """`value` with the numbers that JSON cannot hold in place of the nulls that stand for them."""
    if isinstance(value, Mapping):
        return {key: with_not_finite(item, not_finite, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list):
        return [with_not_finite(item, not_finite, f"{where}[{index}]") for index, item in enumerate(value)]
    return float(not_finite[where]) if not_finite.get(where) in ("nan", "inf", "-inf") else value


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for JSON of unknown origin: no key occurs twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found
