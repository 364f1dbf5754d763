"""A sample of `tests.faults.crash`: every workload, killed at points spread over all of its file operations."""

from __future__ import annotations

import pytest

from .crash import sweep
from .workloads import WORKLOADS, Folder

pytestmark = pytest.mark.wide


@pytest.mark.parametrize("name", WORKLOADS)
def test_killed_at_a_sample_of_points(name: str) -> None:
    with Folder() as folder:
        for seed, num_writers in enumerate((1, 2, 4)):
            row = sweep(
                folder,
                WORKLOADS[name],
                num_writers=num_writers,
                dirty=num_writers == 2,
                direct=num_writers != 1,
                sample=10,
                seed=seed,
            )
            assert row.operations > 30 and row.survived == row.injected >= 5


def test_killed_at_every_point_of_a_replacement() -> None:
    with Folder() as folder:
        row = sweep(folder, WORKLOADS["replace"], num_writers=1, dirty=False, direct=False)
        assert row.survived == row.injected >= 100
