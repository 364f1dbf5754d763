"""For the files `cases_*.py`, which run in a process of their own: the device, and what each test must leave behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from . import simulator as simulators

IN_OWN_PROCESS = os.environ.get("ASYNC_CKPT_SIMULATED") == "1"

if IN_OWN_PROCESS:
    from async_ckpt.host import device

    _loaded = simulators.load()
    device.registrars[simulators.NAME] = lambda: (_loaded.extension.host_register, _loaded.extension.host_unregister)


@pytest.fixture(autouse=IN_OWN_PROCESS)
def simulator(invariant: None, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The simulator; after each test no two accesses are without an order, and no memory is left registered.

    A test that makes races on purpose takes them from `races()` itself.
    """
    made = simulators.loaded()
    made.drain()
    made.races()
    made.forget_waits()
    made.extension.take_contexts()
    yield made
    made.drain()
    made.extension.take_back_injected()
    assert made.races() == []
    assert made.num_registered == 0, "memory was left registered with the device"


@pytest.fixture(params=simulators.MODES)
def any_mode(request: pytest.FixtureRequest, simulator: Any) -> Iterator[str]:
    """The test under each schedule."""
    with simulator.mode(request.param, seed=1):
        yield request.param
