"""The folder of roots that the samples of the sweeps share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .workloads import Folder


@pytest.fixture
def folder() -> Iterator[Folder]:
    with Folder() as made:
        yield made
