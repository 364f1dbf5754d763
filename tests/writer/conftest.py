from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from async_ckpt.writer.pool import WriterPool

from .fakes import TIMEOUT_S, FakeFileSystem


@pytest.fixture
def fs() -> FakeFileSystem:
    return FakeFileSystem()


@pytest.fixture
def make_pool(fs: FakeFileSystem) -> Iterator[Callable[..., WriterPool]]:
    """Makes pools over the fake (or another) file system; closes them, so that a leaked thread fails the test."""
    pools: list[WriterPool] = []

    def make(filesystem: Any = None, **options: Any) -> WriterPool:
        pools.append(WriterPool(filesystem or fs, **{"num_writers": 3, "io_mode": "direct", **options}))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close(TIMEOUT_S)
