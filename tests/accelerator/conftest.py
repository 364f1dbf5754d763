"""For the files `cases_*.py`, which run in a process of their own: the device, and what each test must leave behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

from . import simulator as simulators

KIND = os.environ.get("ASYNC_CKPT_TEST_DEVICE", "")
"""In a process of its own: "simulated", or "real" for the accelerator of this machine."""

if KIND == "simulated":
    simulators.load_for_package()


@pytest.fixture(autouse=KIND == "simulated")
def nothing_left(invariant: None) -> Iterator[None]:
    """After each test no two accesses are without an order, and no memory is registered.

    A test that makes races on purpose takes them from `races()` itself.
    """
    made = simulators.loaded()
    made.begin_anew()
    yield
    made.extension.drain()
    made.extension.take_back_injected()
    assert made.races() == []
    assert made.num_registered == 0, "memory was left registered with the device"


@pytest.fixture
def simulator() -> Any:
    """The simulator, for tests that a real device cannot be asked to take part in."""
    if KIND != "simulated":
        pytest.skip("needs the simulated device")
    return simulators.loaded()


@pytest.fixture
def no_host_sync() -> Any:
    """A context in which this thread may not wait for a device; nothing on a real one."""
    return simulators.loaded().no_host_sync if KIND == "simulated" else contextlib.nullcontext


@pytest.fixture(params=simulators.MODES if KIND == "simulated" else ("real",))
def any_mode(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test under each schedule; on a real device under its own."""
    if KIND != "simulated":
        yield "real"
        return
    with simulators.loaded().mode(request.param, seed=1):
        yield request.param
