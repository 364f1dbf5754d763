"""A sample of `tests.faults.syscalls`."""

from __future__ import annotations

from pathlib import Path

import pytest

from .syscalls import FAULTS, OPTIONAL, refuse, sweep, why_not
from .workloads import Folder

pytestmark = pytest.mark.wide


@pytest.mark.parametrize("call", ["pwrite64", "fsync", "renameat2", "openat", "sendto"])
def test_an_errno_at_a_sample_of_system_calls(call: str) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Folder() as folder:
        row = sweep(folder, call, FAULTS[call], sample=3)
        assert row.operations > 3 and row.survived == row.injected == 3


@pytest.mark.leaves_staging
@pytest.mark.parametrize("call", ["pwrite64", "fsync", "renameat2"])
def test_killed_at_a_real_call(call: str) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Folder() as folder:
        row = sweep(folder, call, ("SIGKILL",), sample=2)
        assert row.operations > 3 and row.survived == row.injected == 2


@pytest.mark.parametrize("call", OPTIONAL)
def test_a_sandbox_that_refuses_an_optional_call_for_good(tmp_path: Path, call: str) -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Folder(on_disk=str(tmp_path)) as folder:
        row = refuse(folder, call)
        assert row.survived == row.injected == 3
        # Which calls look at a file, and which files are reserved, is up to the C library and the file system.
        assert row.operations >= 3 or call in ("statfs", "statx", "fallocate")
