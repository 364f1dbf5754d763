"""A directory in memory for the sweeps: the calls are the same as on a disk, and a sync costs nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


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
