"""Fixtures for every test, and the invariant that each one must leave behind."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.insides import commits_of, threads_left


@pytest.fixture(autouse=True)
def invariant(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[None]:
    """After each test: nothing staged, every chunk returned, none of our threads alive, no descriptor leaked.

    A test that leaves staging behind on purpose (a crash) says so with the marker `leaves_staging`.
    """
    gc.collect()
    # Collections around a test look only at what is newer: to walk all that was imported takes minutes in total.
    gc.freeze()
    before = _open_files()
    yield
    gc.collect()
    assert threads_left() == [], "threads of the package are still alive"
    staging = sys.modules.get("async_ckpt.snapshot.arena")
    if staging is not None:
        assert [a.num_taken for a in staging.live if a.num_taken] == [], "staging chunks were not given back"
    leaked = _open_files() - before
    assert not leaked, f"descriptors leaked: {leaked}"
    if request.node.get_closest_marker("leaves_staging") is None:
        left = [str(p) for p in tmp_path.rglob(".*") if p.name.startswith((".staging.", ".trash.", ".aside."))]
        assert left == [], f"staging left behind: {left}"


def _open_files() -> set[str]:
    """Regular files and directories that this process has open, but for those of installed libraries."""
    names = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            continue
        if target.startswith("/") and not target.startswith(("/dev/", "/proc/")) and "site-packages" not in target:
            names.add(f"{descriptor} -> {target}")
    return names


class HeldCopies:
    """Holds an engine's copy thread until the test lets it go, so that tests order lazy copies instead of sleeping."""

    def __init__(self, engine: Any) -> None:
        self._gate = threading.Event()
        commits_of(engine).pool.copier.submit(self._gate.wait)

    def let_go(self) -> None:
        self._gate.set()


@pytest.fixture
def held_copies() -> Iterator[Any]:
    made: list[HeldCopies] = []

    def hold(engine: Any) -> HeldCopies:
        made.append(HeldCopies(engine))
        return made[-1]

    yield hold
    for held in made:
        held.let_go()


@pytest.fixture
def fast_path(tmp_path: Path) -> Iterator[Path]:
    """A fresh directory on tmpfs, else on disk."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="async-ckpt-test-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)
