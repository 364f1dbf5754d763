"""A sample of `tests.faults.realdisks`."""

from __future__ import annotations

import shutil

import pytest

from .realdisks import MKFS, sweep, sweep_broken, why_not

pytestmark = pytest.mark.wide


def _skip_without(kind: str) -> None:
    reason = why_not() or (f"{MKFS[kind][0]} is not installed" if shutil.which(MKFS[kind][0]) is None else None)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("kind", MKFS)
def test_power_cut_at_a_sample_of_moments(kind: str) -> None:
    _skip_without(kind)
    row = sweep(kind, "replace", direct=True, sample=6)
    assert row.operations > 30 and row.survived == row.injected == 6


def test_a_missing_sync_is_caught_by_a_real_file_system() -> None:
    _skip_without("xfs")
    assert sweep_broken("xfs", "no fsync of the files").lost == 0
