"""A sample of `tests.faults.signals`."""

from __future__ import annotations

import pytest

from .signals import CASES, Case, sweep
from .workloads import Folder

pytestmark = pytest.mark.wide


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_signal_at_a_sample_of_calls(case: Case) -> None:
    with Folder() as folder:
        row = sweep(folder, case, sample=4, seed=len(case.name))
        assert row.operations > 50 and row.survived == row.injected == 4
