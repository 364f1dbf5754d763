"""The rule for how a file is written."""

from __future__ import annotations

import pytest

from async_ckpt.writer.pool import SMALL_BYTES

from .fakes import TIMEOUT_S, Source


@pytest.mark.wide
@pytest.mark.parametrize(
    ("io_mode", "size_bytes", "is_direct"),
    [
        ("auto", SMALL_BYTES - 1, False),
        ("auto", SMALL_BYTES, True),
        ("direct", 4096, True),
        ("buffered", SMALL_BYTES, False),
    ],
)
def test_larger_files_go_past_the_cache_unless_told_otherwise(make_pool, fs, io_mode, size_bytes, is_direct) -> None:
    source = Source(size_bytes, SMALL_BYTES // 8)
    pool = make_pool(io_mode=io_mode, num_writers=4)
    source.write(pool).done.result(TIMEOUT_S)
    assert fs.files["f"].direct == is_direct
    # Writes through the cache hold the inode's lock.
    assert fs.most_at_once["write"] <= (4 if is_direct else 1)
