"""A short `tests.faults.soak`."""

from __future__ import annotations

import pytest

from .soak import soak
from .workloads import Folder

pytestmark = pytest.mark.wide


def test_a_short_soak_leaks_and_loses_nothing() -> None:
    with Folder() as folder:
        root, told = folder.root()
        row = soak(root, told, 120, 1, seed=5)
        assert row.survived == row.injected > 20
