"""A sample of `tests.faults.interrupts`."""

from __future__ import annotations

import pytest

from .interrupts import sweep
from .workloads import Folder

pytestmark = pytest.mark.wide


@pytest.mark.leaves_staging
@pytest.mark.parametrize(
    "name",
    [
        "eager",
        "lazy, close too",
        "lazy, close too, twice",
        "a handler commits and waits",
        "a handler closes",
        "load_into",
        "load_into, twice",
    ],
)
def test_interrupted_at_a_sample_of_steps(name: str) -> None:
    with Folder() as folder:
        row = sweep(folder, name, sample=30, seed=3)
        assert row.operations > 300 and row.survived == row.injected == 30


@pytest.mark.leaves_staging
@pytest.mark.parametrize("name", ["warm, other scalars", "warm, a handler saves"])
def test_a_cached_plan_that_is_interrupted_takes_over_all_scalars_or_none(name: str) -> None:
    with Folder() as folder:
        row = sweep(folder, name, within="plan")
        assert row.operations > 50 and row.survived == row.injected == row.operations
