"""How a sweep is cut into parts."""

from __future__ import annotations

import random

import pytest

from .report import Part, sampled

pytestmark = pytest.mark.wide


def test_all_parts_together_are_the_whole_sweep() -> None:
    points = list(range(10))
    parts = [sampled(points, Part(number, 3), random.Random(1)) for number in (1, 2, 3)]
    assert (
        sorted(point for part in parts for point in part) == points and max(map(len, parts)) - min(map(len, parts)) <= 1
    )


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="part"):
        Part.parse(text)
