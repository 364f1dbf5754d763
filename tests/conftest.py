"""Fixtures for every test, and the invariant that each one must leave behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def invariant(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """After each test: nothing staged, every chunk returned, none of our threads alive, no descriptor leaked.

    A test that leaves staging behind on purpose (a crash) says so with the marker `leaves_staging`.
    """
    gc.collect()
    before = _open_files()
    yield
    gc.collect()
    alive = [t for t in threading.enumerate() if t.name.startswith("async-ckpt")]
    for thread in alive:
        thread.join(10)
    assert [t.name for t in alive if t.is_alive()] == [], "threads of the package are still alive"
    staging = sys.modules.get("async_ckpt.staging")
    if staging is not None:
        assert [a.num_taken for a in staging._arenas if a.num_taken] == [], "staging chunks were not given back"
    leaked = _open_files() - before
    assert not leaked, f"descriptors leaked: {leaked}"
    if request.node.get_closest_marker("leaves_staging") is None:
        left = [str(p) for p in tmp_path.rglob(".*") if p.name.startswith((".staging.", ".trash.", ".aside."))]
        assert left == [], f"staging left behind: {left}"


def _open_files() -> set[str]:
    """Regular files and directories that this process has open."""
    names = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target.startswith("/") and not target.startswith(("/dev/", "/proc/")):
            names.add(f"{descriptor} -> {target}")
    return names
