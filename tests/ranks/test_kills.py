"""A sample of `tests.faults.rank_kills`: SIGKILL at random points of commits, then a restart with another number of
ranks.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.rank_kills import Tally, kill_one


@pytest.mark.wide
@pytest.mark.parametrize(("seed", "kind"), [(0, "tcp"), (1, "file"), (2, "zero")])
def test_one_rank_is_killed_at_a_random_point(tmp_path: Path, seed: int, kind: str) -> None:
    tally = Tally()
    kill_one(tmp_path, 3, seed, tally, kind)
    assert tally.committed + tally.failed + tally.unknown >= 1
