"""A sample of `tests.faults.contest`, and the proof that it sees what the claims prevent."""

from __future__ import annotations

import dataclasses

import pytest

from tests.support.faulty_filesystem import Operation

from .contest import CONTESTS, Contest, sweep
from .workloads import Folder

pytestmark = pytest.mark.wide


@pytest.mark.parametrize("contest", CONTESTS, ids=lambda contest: contest.name)
def test_a_sample_of_games(contest: Contest) -> None:
    with Folder() as folder:
        row = sweep(folder, contest, sample=15)
        assert row.operations > 30 and row.survived == row.injected == 15


def test_without_locks_a_reported_commit_is_lost() -> None:
    """Retention moves away what has just replaced the checkpoint it looked at."""

    def moves_away(op: Operation) -> bool:
        return op.name == "rename" and op.path.endswith("/oldest")

    with Folder() as folder:
        row = sweep(folder, dataclasses.replace(CONTESTS[0], has_locks=False), stop=False, begins_at=moves_away)
        assert row.lost > 0 and any("is gone" in note for note in row.notes), row
        row = sweep(folder, CONTESTS[0], begins_at=moves_away)
        assert row.lost == 0
