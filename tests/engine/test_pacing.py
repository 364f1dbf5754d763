"""The pacer against a simulated training: a clock that only moves when told, saves that slow the steps beside them,
failures.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field

import pytest

from async_ckpt.engine.pacing import CheckpointPacer, daly_interval_s
from async_ckpt.errors import ConfigError
from async_ckpt.metrics import CommitMetrics


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Save:
    """A pending commit that ends at a given time."""

    clock: Clock
    ends_s: float
    metrics: CommitMetrics = field(default_factory=lambda: CommitMetrics("t"))

    def done(self) -> bool:
        return self.clock.now_s >= self.ends_s


STEP_S, STALL_S, SLOW_STEPS, SLOWDOWN = 1.0, 0.5, 4, 0.25
COST_S = STALL_S + SLOW_STEPS * SLOWDOWN


class Training:
    """Steps of one second; a save stalls for half a second and makes the next four steps a quarter slower."""

    def __init__(self, pacer: CheckpointPacer, clock: Clock) -> None:
        self.pacer, self.clock = pacer, clock
        self.saves: list[float] = []
        self.flying: Save | None = None

    def step(self, number: int) -> bool:
        slow = self.flying is not None and not self.flying.done()
        self.clock.now_s += STEP_S + (SLOWDOWN if slow else 0.0)
        if not self.pacer.should_save(number):
            return False
        assert self.flying is None or self.flying.done(), "saves piled up"
        self.saves.append(self.clock.now_s)
        self.clock.now_s += STALL_S
        # The slow steps last 1.25 s each; the fourth one is the last that begins before the end.
        self.flying = Save(self.clock, self.clock.now_s + (SLOW_STEPS - 0.5) * (STEP_S + SLOWDOWN))
        self.pacer.saved(self.flying)
        return True


def run(pacer_options: dict, num_steps: int) -> tuple[CheckpointPacer, Training]:
    clock = Clock()
    pacer = CheckpointPacer(clock=clock, **pacer_options)
    training = Training(pacer, clock)
    for number in range(num_steps):
        training.step(number)
    return pacer, training


@pytest.mark.wide
def test_measures_steps_and_the_full_cost_of_saves():
    pacer, _ = run({"overhead": 0.02}, 400)
    report = pacer.report()
    assert report.step_s == pytest.approx(STEP_S)
    assert report.cost_s == pytest.approx(COST_S)
    assert report.interval_s == pytest.approx(COST_S * 0.98 / 0.02)


@pytest.mark.parametrize("overhead", [0.005, 0.02, 0.1, 0.3])
def test_overhead_stays_under_the_budget_and_uses_it(overhead):
    pacer, training = run({"overhead": overhead}, 5000)
    # The save that is not paid back yet may stand above the budget.
    last_s = training.saves[-1]
    spent_s = COST_S * (len(training.saves) - 1)
    assert spent_s / last_s <= overhead * 1.0001
    assert spent_s / last_s >= overhead * 0.7
    assert pacer.report().num_saves == len(training.saves)


def test_same_times_give_the_same_answers():
    assert run({"overhead": 0.03}, 700)[1].saves == run({"overhead": 0.03}, 700)[1].saves


def test_failure_rate_sets_the_interval_where_it_is_longer_than_the_budget():
    mtbf_s = 40_000.0
    _, training = run({"overhead": 0.5, "mtbf_s": mtbf_s}, 3000)
    gaps = [b - a - COST_S for a, b in itertools.pairwise(training.saves)]
    assert gaps[2:] == pytest.approx([daly_interval_s(COST_S, mtbf_s)] * len(gaps[2:]), abs=STEP_S)


def test_budget_wins_over_a_failure_rate_that_asks_for_more():
    assert len(run({"overhead": 0.01, "mtbf_s": 100.0}, 3000)[1].saves) == len(run({"overhead": 0.01}, 3000)[1].saves)


def test_daly_is_youngs_formula_for_cheap_saves_and_bounded_for_dear_ones():
    young_s = math.sqrt(2 * 1.0 * 1e6)
    assert daly_interval_s(1.0, 1e6) == pytest.approx(young_s, rel=2e-3)
    assert daly_interval_s(500.0, 100.0) == 100.0


def lost_share(save_every_step, mtbf_s: float, *, num_steps: int, seed: int) -> float:
    """Share of the wall time that was not first-time work: saves, and work redone after failures."""
    rng = random.Random(seed)
    clock = Clock()
    done = saved = 0
    training, next_failure_s = save_every_step(clock), rng.expovariate(1 / mtbf_s)
    step = 0
    while done < num_steps:
        step += 1
        made = training.step(step)
        done += 1
        if made:
            pending_saved = done
        if training.flying is not None and training.flying.done():
            saved = pending_saved
        if clock.now_s >= next_failure_s:
            done, training.flying = saved, None
            next_failure_s = clock.now_s + rng.expovariate(1 / mtbf_s)
    return 1 - num_steps * STEP_S / clock.now_s


class EveryNth:
    """The fixed interval that the pacer competes with."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def should_save(self, step: int) -> bool:
        return step % self.num_steps == 0

    def saved(self, pending: Save) -> None:
        return None


@pytest.mark.wide
def test_loses_less_than_fixed_intervals_under_failures():
    """Cost 1.5 s, a failure every hour on average: the optimum is about 102 s."""
    mtbf_s, num_steps, seeds = 3600.0, 30_000, range(6)

    def average(make) -> float:
        return sum(lost_share(make, mtbf_s, num_steps=num_steps, seed=seed) for seed in seeds) / len(seeds)

    paced = average(lambda clock: Training(CheckpointPacer(0.5, mtbf_s, clock=clock), clock))
    fixed = {n: average(lambda clock, n=n: Training(EveryNth(n), clock)) for n in (8, 25, 50, 100, 200, 400, 1600)}
    assert paced <= 1.1 * min(fixed.values()), (paced, fixed)
    for wrong in (8, 25, 400, 1600):
        assert paced < 0.8 * fixed[wrong], (wrong, paced, fixed)


def test_never_piles_up_unless_asked():
    clock = Clock()
    pacer = CheckpointPacer(0.5, clock=clock)
    endless = Save(clock, math.inf)
    first = Save(clock, 7.0)
    answers = []
    for step in range(40):
        clock.now_s += 1
        answers.append(pacer.should_save(step))
        if answers[-1]:
            pacer.saved(first if answers.count(True) == 1 else endless)
    assert answers.count(True) == 2
    clock.now_s += 1
    assert not pacer.should_save(40)
    clock.now_s += 1
    assert pacer.should_save(41, even_if_pending=True)


def test_overlapping_saves_share_their_cost():
    clock = Clock()
    pacer = CheckpointPacer(0.1, clock=clock)
    for step in range(1, 7):
        clock.now_s += 1.0
        pacer.should_save(step)
    pacer.saved(Save(clock, clock.now_s + 1.0))
    pacer.saved(Save(clock, clock.now_s + 1.0))
    clock.now_s += 3.0
    pacer.should_save(7)
    assert pacer.report().cost_s == pytest.approx(1.0)
    assert pacer.report().spent_s == pytest.approx(2.0)


def test_works_without_being_told_of_synchronous_saves():
    clock = Clock()
    pacer = CheckpointPacer(0.1, clock=clock)
    saves = 0
    for step in range(1000):
        clock.now_s += 1.0
        if pacer.should_save(step):
            saves += 1
            clock.now_s += 2.0
    assert pacer.report().cost_s == pytest.approx(2.0)
    assert pacer.report().overhead <= 0.105
    assert saves == 1 + 994 // 18


def test_stall_is_a_lower_bound_of_the_cost():
    """Steps so noisy that the one with the save was by chance faster than the others."""
    clock = Clock()
    pacer = CheckpointPacer(0.1, clock=clock)
    for step in range(10):
        clock.now_s += 5.0
        if pacer.should_save(step):
            pacer.saved(Save(clock, 0.0, CommitMetrics("t", stall_s=0.3, guard_wait_s=0.1)))
            clock.now_s -= 4.0
    assert pacer.report().cost_s == pytest.approx(0.3)


def test_time_outside_training_is_not_counted():
    clock = Clock()
    pacer = CheckpointPacer(0.1, clock=clock)
    for step in range(20):
        clock.now_s += 1.0
        pacer.should_save(step)
        if step == 3:
            clock.now_s += 1000.0
            pacer.skip_time()
        if step == 10:
            clock.now_s += 1000.0
            pacer.should_save(500)
            pacer.should_save(10)
    assert pacer.report().elapsed_s < 30.0


def test_longest_interval_wins_over_the_budget():
    _, training = run({"overhead": 0.001, "max_interval_s": 60.0}, 600)
    assert max(b - a for a, b in itertools.pairwise(training.saves)) <= 60.0 + COST_S + STEP_S


def test_shortest_interval_holds_from_the_start():
    _, training = run({"overhead": 0.9, "min_interval_s": 50.0}, 600)
    assert training.saves[0] >= 50.0
    assert min(b - a for a, b in itertools.pairwise(training.saves)) >= 50.0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"overhead": 2}, "overhead"),
        ({"overhead": 0}, "overhead"),
        ({"overhead": float("nan")}, "overhead"),
        ({"overhead": "2%"}, "overhead"),
        ({"overhead": None}, "mtbf_s"),
        ({"mtbf_s": -1}, "mtbf_s"),
        ({"mtbf_s": math.inf}, "mtbf_s"),
        ({"min_interval_s": -1}, "min_interval_s"),
        ({"min_interval_s": 9, "max_interval_s": 3}, "max_interval_s"),
    ],
)
def test_bad_values_are_refused_by_name(options, named):
    with pytest.raises(ConfigError, match=named):
        CheckpointPacer(**options)
