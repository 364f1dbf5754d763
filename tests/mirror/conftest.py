"""One server of each kind for all tests here; each test has a prefix of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .servers import Moto, Rclone, SeaweedFS, Server

pytest.importorskip("obstore")


def _started(kind: type[Server], directory: Path) -> Iterator[Server]:
    server = kind(directory)
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def moto(tmp_path_factory: Any) -> Iterator[Server]:
    yield from _started(Moto, tmp_path_factory.mktemp("moto"))


@pytest.fixture(scope="session")
def rclone(tmp_path_factory: Any) -> Iterator[Server]:
    yield from _started(Rclone, tmp_path_factory.mktemp("rclone"))


@pytest.fixture(scope="session")
def seaweedfs(tmp_path_factory: Any) -> Iterator[Server]:
    yield from _started(SeaweedFS, tmp_path_factory.mktemp("seaweedfs"))


_numbers = itertools.count()


@pytest.fixture
def prefix() -> str:
    """New for each test, so that tests share servers and nothing else."""
    return f"run-{next(_numbers)}"
