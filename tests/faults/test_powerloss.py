"""A sample of `tests.faults.powerloss`, and the test of the test: every broken variant must be caught."""

from __future__ import annotations

import pytest

from .powerloss import BROKEN, sweep, sweep_broken
from .workloads import WORKLOADS, Folder

pytestmark = pytest.mark.wide


@pytest.mark.parametrize("name", sorted(WORKLOADS.keys() - {"retention", "given up"}))
def test_every_state_holds_what_was_reported(name: str) -> None:
    with Folder() as folder:
        row = sweep(folder, name, direct=True, num_writers=2, every=5, num_random=2)
        assert row.operations >= 8 and row.survived == row.injected >= 10


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_variant_is_caught(name: str) -> None:
    with Folder() as folder:
        assert sweep_broken(folder, name, every=4 if "retention" not in name else 12, num_random=2).lost > 0
