"""The protocol alone: every rank learns the same outcome, at a bounded cost, whatever the other ranks do."""

from __future__ import annotations

from typing import Any

import pytest

from async_ckpt.ranks import protocol as protocol
from async_ckpt.ranks.joining import DISAGREE_S, Announcements
from async_ckpt.ranks.rank_requests import AttemptFailed, CommitOutcome, RankInfo
from tests.ranks.simulation import Dies, Pause, Script, Simulation

TIMEOUT_S = 60.0


def _info(rank: int, world_size: int, timeout_s: float = TIMEOUT_S) -> RankInfo:
    return RankInfo(rank, world_size, timeout_s)


def rank_zero(
    info: RankInfo, tag: str, write_s: float, publish_s: float, renames: list[str], merge_s: float = 0.0
) -> Script:
    attempt = yield from protocol.announce(info, tag, f".staging.{tag}")
    yield Pause(write_s)
    try:
        yield from protocol.report(info, attempt, "digest of 0")
        yield from protocol.gather(info, attempt)
        yield Pause(merge_s)
        yield from protocol.decide(info, attempt, 1)
    except AttemptFailed as failed:
        yield from protocol.await_quit(info, attempt)
        yield from protocol.retire(info, attempt)
        return failed.outcome
    renames.append(tag)
    yield Pause(publish_s)
    outcome = CommitOutcome(True, None, "", 0, True)
    yield from protocol.conclude(info, attempt, outcome)
    yield from protocol.retire(info, attempt)
    return outcome


def other_rank(
    info: RankInfo, tag: str, write_s: float, known: Announcements | None = None, *, fails: str = "", dies: str = ""
) -> Script:
    try:
        attempt, _ = yield from (known or Announcements(info)).join(tag)
    except AttemptFailed as failed:
        if failed.attempt is not None:
            yield from protocol.settle(info, failed.attempt)
        return failed.outcome
    yield Pause(write_s)
    if dies == "writing":
        raise Dies
    if fails:
        outcome = yield from protocol.fail(info, attempt, fails)
        yield from protocol.settle(info, attempt)
        return outcome
    try:
        yield from protocol.report(info, attempt, f"digest of {info.rank}")
        if dies == "reported":
            raise Dies
        outcome = yield from protocol.await_result(info, attempt)
    except AttemptFailed as failed:
        outcome = failed.outcome
    yield from protocol.settle(info, attempt)
    return outcome


def run(scripts: dict[int, Script], world_size: int) -> Simulation:
    simulation = Simulation(world_size)
    simulation.run(scripts)
    return simulation


def outcomes(simulation: Simulation, *, without: tuple[int, ...] = ()) -> list[Any]:
    found = [outcome for rank, outcome in simulation.outcomes.items() if rank not in without]
    unexpected = [outcome for outcome in found if not isinstance(outcome, CommitOutcome)]
    assert unexpected == []
    return found


def left_keys(simulation: Simulation) -> set[str]:
    return set(simulation.store.data) - {"seq", "head"}


@pytest.mark.wide
@pytest.mark.parametrize("world_size", [1, 2, 64, 1024, pytest.param(16384, marks=pytest.mark.timeout(120))])
def test_cost_of_one_commit_is_constant_per_rank(world_size: int) -> None:
    renames: list[str] = []
    scripts = {0: rank_zero(_info(0, world_size), "a", 5.0, 0.1, renames)}
    scripts |= {rank: other_rank(_info(rank, world_size), "a", 5.0) for rank in range(1, world_size)}
    simulation = run(scripts, world_size)
    assert renames == ["a"]
    assert all(outcome.ok for outcome in outcomes(simulation))
    assert left_keys(simulation) == set()
    requests = simulation.store.requests
    polls = requests.pop("Poll", 0)
    total = sum(requests.values())
    assert total <= 9 * world_size + 16
    assert polls <= 40 * world_size + 200
    # The slowest rank hears of it within seconds of the rename, at any size.
    assert max(simulation.ended_s.values()) < 5.2 + 4 * 5.0
    ended_s = max(simulation.ended_s.values())
    print(
        f"{world_size} ranks: {total} requests, {polls} polls, ended {ended_s:.2f} s, store busy "
        f"{simulation.store.busy_s:.2f} s"
    )


@pytest.mark.wide
@pytest.mark.parametrize("world_size", [2, 5, 1024])
@pytest.mark.parametrize(
    ("how", "expected"),
    [({"fails": "OSError: disk full"}, "disk full"), ({"dies": "writing"}, "not reported"), ({}, "")],
)
def test_a_failed_rank_fails_all_and_is_named(world_size: int, how: dict[str, str], expected: str) -> None:
    culprit = world_size - 1
    renames: list[str] = []
    scripts = {0: rank_zero(_info(0, world_size), "a", 1.0, 0.1, renames)}
    scripts |= {rank: other_rank(_info(rank, world_size), "a", 1.0) for rank in range(1, culprit)}
    scripts[culprit] = other_rank(_info(culprit, world_size), "a", 1.0, **how)
    simulation = run(scripts, world_size)
    found = outcomes(simulation, without=(culprit,))
    if not how:
        assert renames == ["a"]
        assert all(v.ok for v in found)
        return
    assert renames == []
    for outcome in found:
        assert (outcome.ok, outcome.rank, outcome.committed) == (False, culprit, False)
        assert expected in outcome.cause
    limit_s = 1.0 + (TIMEOUT_S if "dies" in how else 0.0) + 12.0
    others = [ended for rank, ended in simulation.ended_s.items() if rank not in (0, culprit)]
    assert all(ended < limit_s for ended in others)
    assert left_keys(simulation) == set()


def test_a_rank_that_dies_after_its_report_does_no_harm() -> None:
    renames: list[str] = []
    scripts = {0: rank_zero(_info(0, 3), "a", 1.0, 0.1, renames), 1: other_rank(_info(1, 3), "a", 1.0)}
    scripts[2] = other_rank(_info(2, 3), "a", 0.5, dies="reported")
    simulation = run(scripts, 3)
    assert renames == ["a"]
    assert simulation.outcomes[1].ok
    # Nobody will ever read the result for it: rank 0 drops the keys all the same.
    assert left_keys(simulation) == set()


def test_rank_zero_dies_before_it_decides() -> None:
    def dies(info: RankInfo) -> Script:
        attempt = yield from protocol.announce(info, "a", "x")
        yield from protocol.report(info, attempt, "d")
        raise Dies

    scripts = {0: dies(_info(0, 4))} | {rank: other_rank(_info(rank, 4), "a", 1.0) for rank in range(1, 4)}
    simulation = run(scripts, 4)
    for outcome in outcomes(simulation, without=(0,)):
        assert (outcome.ok, outcome.rank, outcome.committed) == (False, 0, False)
    assert max(simulation.ended_s.values()) < 1.0 + TIMEOUT_S + 12.0


def test_rank_zero_dies_while_it_renames() -> None:
    def dies(info: RankInfo) -> Script:
        attempt = yield from protocol.announce(info, "a", "x")
        yield from protocol.report(info, attempt, "d")
        yield from protocol.gather(info, attempt)
        yield from protocol.decide(info, attempt, 1)
        raise Dies

    scripts = {0: dies(_info(0, 3))} | {rank: other_rank(_info(rank, 3), "a", 1.0) for rank in (1, 2)}
    simulation = run(scripts, 3)
    for outcome in outcomes(simulation, without=(0,)):
        assert (outcome.ok, outcome.rank, outcome.committed) == (False, 0, None)
    assert max(simulation.ended_s.values()) < 1.0 + 2 * TIMEOUT_S + 12.0


def test_ranks_that_disagree_on_the_tag_are_named_with_their_tag() -> None:
    renames: list[str] = []
    scripts = {0: rank_zero(_info(0, 3), "step-100", 3.0, 0.1, renames), 1: other_rank(_info(1, 3), "step-100", 3.0)}
    scripts[2] = other_rank(_info(2, 3), "step-101", 3.0)
    simulation = run(scripts, 3)
    assert renames == []
    for rank in (0, 1):
        assert simulation.outcomes[rank].rank == 2
        assert "step-101" in simulation.outcomes[rank].cause
    assert "'step-100'" in simulation.outcomes[2].cause
    assert max(simulation.ended_s.values()) < 3 * DISAGREE_S, "not the whole timeout"


def test_jobs_of_different_size_do_not_mix() -> None:
    renames: list[str] = []
    scripts = {0: rank_zero(_info(0, 2), "a", 3.0, 0.1, renames), 1: other_rank(_info(1, 3), "a", 3.0)}
    simulation = run(scripts, 2)
    assert renames == []
    assert "counts 3 ranks" in simulation.outcomes[0].cause


def test_a_late_rank_cannot_undo_a_decision() -> None:
    # Rank 2 gives up at the very moment at which rank 0 publishes: the claim decides, and both report the same.
    for publish_s in (0.0, 30.0, 59.0):
        renames: list[str] = []
        scripts = {0: rank_zero(_info(0, 3), "a", 50.0, publish_s, renames), 1: other_rank(_info(1, 3), "a", 50.0)}
        scripts[2] = other_rank(RankInfo(2, 3, 20.0), "a", 31.0)
        simulation = run(scripts, 3)
        # "Not committed" is never said of what was renamed; at the worst the outcome is unknown.
        assert {outcome.committed for outcome in outcomes(simulation)} <= ({True, None} if renames else {False})


def test_rank_zero_obeys_a_rank_that_gave_up_while_it_merged() -> None:
    renames: list[str] = []
    scripts = {0: rank_zero(_info(0, 3), "a", 50.0, 0.1, renames, merge_s=10.0), 1: other_rank(_info(1, 3), "a", 50.0)}
    scripts[2] = other_rank(RankInfo(2, 3, 20.0), "a", 35.0)
    simulation = run(scripts, 3)
    assert renames == []
    assert {(outcome.ok, outcome.by) for outcome in outcomes(simulation)} == {(False, 2)}


def test_attempts_of_one_tag_follow_each_other_and_a_rank_that_skipped_one_joins_the_next() -> None:
    renames: list[str] = []
    known = Announcements(_info(1, 2))

    def zero() -> Script:
        first = yield from rank_zero(_info(0, 2), "a", 1.0, 0.1, renames)
        second = yield from rank_zero(_info(0, 2), "a", 1.0, 0.1, renames)
        return (first.ok, second.ok)

    def one() -> Script:
        # The first attempt has ended, and its successor is about to be announced.
        yield Pause(3 * TIMEOUT_S + 0.9)
        return (yield from other_rank(_info(1, 2), "a", 1.0, known))

    simulation = run({0: zero(), 1: one()}, 2)
    assert simulation.outcomes[0] == (False, True)
    assert simulation.outcomes[1].ok
    assert renames == ["a"]


def test_an_attempt_that_failed_before_a_rank_came_is_that_ranks_failure_too() -> None:
    renames: list[str] = []

    def late(info: RankInfo) -> Script:
        yield Pause(1.0)
        return (yield from other_rank(info, "a", 1.0))

    scripts = {
        0: rank_zero(_info(0, 3), "a", 5.0, 0.1, renames),
        1: other_rank(_info(1, 3), "a", 0.0, fails="OSError: disk full"),
    }
    scripts[2] = late(_info(2, 3))
    simulation = run(scripts, 3)
    assert renames == []
    assert (simulation.outcomes[2].rank, simulation.outcomes[2].cause) == (1, "OSError: disk full")
    assert simulation.ended_s[2] < 3
    assert left_keys(simulation) == set()


def test_a_rank_that_was_away_until_all_was_forgotten_does_not_say_that_nothing_was_committed() -> None:
    renames: list[str] = []

    def away(info: RankInfo) -> Script:
        attempt, _ = yield from Announcements(info).join("a")
        yield from protocol.report(info, attempt, "digest")
        # Stopped here, while the others end and rank 0 drops the keys.
        yield Pause(5 * TIMEOUT_S)
        try:
            return (yield from protocol.await_result(info, attempt))
        except AttemptFailed as failed:
            return failed.outcome

    scripts = {
        0: rank_zero(_info(0, 3), "a", 1.0, 0.1, renames),
        1: other_rank(_info(1, 3), "a", 1.0),
        2: away(_info(2, 3)),
    }
    simulation = run(scripts, 3)
    assert renames == ["a"]
    assert (simulation.outcomes[2].ok, simulation.outcomes[2].committed) == (False, None)
    assert left_keys(simulation) == set()


def test_an_attempt_without_this_rank_is_let_go_when_it_comes_to_the_next_of_that_tag() -> None:
    """Rank 0 waits for the word of each rank before it removes what was staged; one that skipped it gives its own."""
    let_go_s: list[float] = []

    def zero(info: RankInfo) -> Script:
        first = yield from protocol.announce(info, "a", "x")
        yield from protocol.fail(info, first, "OSError: disk full")
        second = yield from protocol.announce(info, "a", "y")
        yield from protocol.await_quit(info, first)
        let_go_s.append(simulation.now_s)
        yield from protocol.retire(info, first)
        yield from protocol.retire(info, second)

    def one(info: RankInfo) -> Script:
        yield Pause(1.0)
        attempt, _ = yield from Announcements(info).join("a")
        yield from protocol.settle(info, attempt)
        return attempt

    simulation = Simulation(2)
    simulation.run({0: zero(_info(0, 2)), 1: one(_info(1, 2))})
    assert simulation.outcomes[1] == 2
    assert let_go_s[0] < 3.0
    assert left_keys(simulation) == set()


def test_a_tag_that_was_skipped_and_is_over_is_not_what_rank_zero_waits_for() -> None:
    """A rank that comes to the next checkpoint long before rank 0 does not take the one it skipped for its rival."""
    renames: list[str] = []

    def zero(info: RankInfo) -> Script:
        skipped = yield from rank_zero(info, "skipped", 1.0, 0.1, renames)
        yield Pause(3 * DISAGREE_S)
        return skipped.ok, (yield from rank_zero(info, "next", 1.0, 0.1, renames)).ok

    def one(info: RankInfo) -> Script:
        yield Pause(TIMEOUT_S + 5.0)
        return (yield from other_rank(info, "next", 1.0))

    simulation = run({0: zero(_info(0, 2)), 1: one(_info(1, 2))}, 2)
    assert simulation.outcomes[0] == (False, True)
    assert simulation.outcomes[1].ok
    assert renames == ["next"]
    assert left_keys(simulation) == set()
