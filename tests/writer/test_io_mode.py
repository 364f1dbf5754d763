"""The rule for how a file is written."""

from __future__ import annotations

import pytest

from async_ckpt.writer.io_mode import BUFFERED, SMALL_BYTES, IoMode, choose


@pytest.mark.wide
def test_small_files_go_through_the_cache_unless_told_otherwise() -> None:
    assert choose("auto", 16, SMALL_BYTES - 1) == BUFFERED
    assert choose("direct", 16, 1) == IoMode(True, 16)


def test_larger_files_go_past_the_cache_with_all_writers_unless_told_otherwise() -> None:
    assert choose("auto", 7, SMALL_BYTES) == IoMode(True, 7)
    assert choose("buffered", 7, 1 << 40) == BUFFERED
