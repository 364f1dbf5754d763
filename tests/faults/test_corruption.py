"""A sample of `tests.faults.corruption`."""

from __future__ import annotations

import pytest

from async_ckpt.format.names import MANIFEST_NAME

from .corruption import sweep
from .workloads import Folder

pytestmark = pytest.mark.wide


@pytest.mark.parametrize("name", [MANIFEST_NAME, "model.pt"])
def test_damage_is_named_and_never_loaded(name: str) -> None:
    with Folder() as folder:
        row = sweep(folder, name, num_flips=150)
        assert row.survived == row.injected == row.operations > 160
