"""A sample of `tests.faults.interrupts`."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import torch

from async_ckpt.reading.load import load_committed
from tests.reading.committed import commit
from tests.support.comparing import torch_bytes

from .interrupts import GAMES, Interrupter, sweep, unraisable_forgotten
from .report import Extent
from .workloads import Folder

pytestmark = pytest.mark.wide

WARM = ("warm, other scalars", "warm, a handler saves")


@pytest.mark.leaves_staging
@pytest.mark.parametrize("name", sorted(GAMES.keys() - {"lazy", *WARM}))
def test_interrupted_at_a_sample_of_steps(folder: Folder, name: str) -> None:
    row = sweep(folder, name, Extent(30, seed=3))
    assert row.operations > 300 and row.survived == row.injected == 30


@pytest.mark.leaves_staging
@pytest.mark.parametrize("name", WARM)
def test_a_cached_plan_that_is_interrupted_takes_over_all_scalars_or_none(folder: Folder, name: str) -> None:
    row = sweep(folder, name, within="plan")
    assert row.operations > 50 and row.survived == row.injected == row.operations


def test_an_interrupted_load_leaves_no_descriptor_open(tmp_path: Path) -> None:
    """At each step but within the system call that opens: whoever has the descriptor closes it, or is forgotten."""
    catalog = commit(tmp_path, "a", {"m.pt": torch_bytes({"x": torch.ones(300), "y": 1})})

    def num_open() -> int:
        return len(os.listdir("/proc/self/fd"))

    def interrupted(k: int | None) -> int:
        interrupter = Interrupter(k, within=("storage/read_file.py", "storage/filesystem.py", "reading", "threads"))
        with unraisable_forgotten(), contextlib.suppress(KeyboardInterrupt), interrupter.watching():
            load_committed(catalog, "a", "m.pt", num_threads=1)
        return interrupter.num_steps

    num_steps, before = interrupted(None), num_open()
    assert num_steps > 300
    leaks = []
    for k in range(num_steps):
        interrupted(k)
        if num_open() > before:
            leaks, before = [*leaks, k], num_open()
    assert leaks == []
