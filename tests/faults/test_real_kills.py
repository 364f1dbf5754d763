"""A sample of `tests.faults.kills`."""

from __future__ import annotations

from pathlib import Path

import pytest

from .kills import sweep, why_not
from .workloads import Folder

pytestmark = pytest.mark.wide


@pytest.mark.leaves_staging
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "renameat2"])
def test_killed_at_a_real_call(tmp_path: Path, call: str) -> None:
    if why_not() is not None:
        pytest.skip(str(why_not()))
    with Folder(on_disk=str(tmp_path)) as folder:
        row = sweep(folder, call, sample=1, seed=len(call))
        assert row.operations > 3 and row.survived == row.injected >= 1
