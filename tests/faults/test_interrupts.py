"""A sample of `tests.faults.interrupts`."""

from __future__ import annotations

import pytest

from .interrupts import sweep
from .workloads import Folder

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.leaves_staging
@pytest.mark.parametrize(("lazy", "close_inside", "again"), [(False, False, None), (True, True, None), (True, True, 12)])
def test_interrupted_at_a_sample_of_steps(lazy: bool, close_inside: bool, again: int | None) -> None:
    with Folder() as folder:
        row = sweep(folder, lazy=lazy, close_inside=close_inside, again=again, sample=60, seed=3)
        assert row.operations > 500 and row.survived == row.injected == 60
