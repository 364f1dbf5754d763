"""A small `tests.faults.crowd`."""

from __future__ import annotations

import pytest

from .crowd import crowd
from .workloads import Folder

pytestmark = pytest.mark.wide


@pytest.mark.parametrize(
    ("kill", "stop"), [(False, False), (True, False), (False, True)], ids=["all live", "one killed", "one stopped"]
)
def test_processes_on_one_root(kill: bool, stop: bool) -> None:
    with Folder() as folder:
        row = crowd(folder.root()[0], 3, 4, kill=kill, stop=stop)
        assert row.survived == row.injected > 20
