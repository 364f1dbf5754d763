"""Small blocks, so that small files are read in many steps."""

from __future__ import annotations

import pytest

from async_ckpt.reading import verified_file as reading


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read is one page."""
    monkeypatch.setattr(reading, "BLOCK_BYTES", 4096)
