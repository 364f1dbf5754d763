"""When to save: often enough to lose little work, seldom enough to cost little time.

What a save costs is not its stall alone: the steps that run while it is being written are slower. The pacer sees both,
because it times every step itself: the cost of a save is how much longer the steps took from the save until it ended
than as many undisturbed ones.

- *Budget.* After a save that cost `c`, the next one waits for `c * (1 - overhead) / overhead` seconds of training, so
  that each save has paid for itself before the next.
- *Failure rate.* With a mean time between failures M and a cost C, the least time is lost at the interval
  `sqrt(2 C M)` (Young 1974); Daly's higher-order form of 2006 is used, which also holds where C is not small against M.
- With both, the longer of the two intervals counts: the budget is a ceiling.

Sources: J. W. Young, "A first order approximation to the optimum checkpoint interval", Communications of the ACM 17(9),
1974. J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
Computer Systems 22(3), 2006, equation 37.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import ConfigError, check_positive, is_number
from .pending import PendingCommit

_NUM_STEPS = 64
_NUM_COSTS = 5
_NUM_FIRST_STEPS = 5


@dataclass(frozen=True, slots=True)
class PacingReport:
    """What the pacer has measured and decided so far; times in seconds, None before there is a measurement."""

    step_s: float | None
    """Median step with no save in flight."""
    cost_s: float | None
    """Median cost of the last few saves: their stall and the slowdown of the steps beside them."""
    interval_s: float | None
    """Training time between the last save and the next one."""
    num_saves: int
    spent_s: float
    """Total cost of all saves."""
    elapsed_s: float
    """Training time seen, saves included."""

    @property
    def overhead(self) -> float:
        """Share of the time that saves have cost."""
        return self.spent_s / self.elapsed_s if self.elapsed_s > 0 else 0.0


def daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Training time between saves that loses least, for saves of `cost_s` and one failure per `mtbf_s` on average."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = math.sqrt(cost_s / (2 * mtbf_s))
    return math.sqrt(2 * cost_s * mtbf_s) * (1 + ratio / 3 + ratio * ratio / 9) - cost_s


class CheckpointPacer:
    """Says at each step whether to save now.

    ```python
    pacer = CheckpointPacer(overhead=0.02, mtbf_s=6 * 3600)
    for step in range(num_steps):
        train_step()
        if pacer.should_save(step):
            engine.create(tag); engine.save(state, "model.pt")
            pacer.saved(engine.commit(tag))
    ```

    Guarantees:
    - No save is asked for while an earlier one is unfinished, unless `should_save(..., even_if_pending=True)`.
    - The same times give the same answers: nothing but `clock` is read.
    - From the second save on, the measured cost stays under `overhead` of the time (`max_interval_s` may break that).

    One thread, the training one; never blocks. The first save comes after five steps, to learn what one costs. With
    many ranks the clocks differ: let one rank ask and broadcast its answer.

    Args:
        overhead: largest share of the time that saves may cost, between 0 and 1; None: no budget (then give `mtbf_s`).
        mtbf_s: mean time between failures of the whole job, in seconds.
        min_interval_s, max_interval_s: bounds on the training time between saves; the upper one wins over the budget.
        clock: seconds, never stepping back.

    Raises:
        ConfigError: a bad value, or neither a budget nor a failure rate.
    """

    def __init__(
        self,
        overhead: float | None = 0.02,
        mtbf_s: float | None = None,
        *,
        min_interval_s: float = 0.0,
        max_interval_s: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if overhead is None and mtbf_s is None:
            raise ConfigError("give overhead (a share such as 0.02), mtbf_s (seconds), or both")
        if overhead is not None and not (is_number(overhead) and 0 < overhead < 1):
            raise ConfigError(f"overhead must be a share between 0 and 1, such as 0.02 for 2 %, not {overhead!r}")
        if mtbf_s is not None:
            check_positive("mtbf_s", mtbf_s)
        if not (is_number(min_interval_s) and 0 <= min_interval_s < math.inf):
            raise ConfigError(f"min_interval_s must be a number of seconds, at least 0, not {min_interval_s!r}")
        if max_interval_s is not None and not (is_number(max_interval_s) and min_interval_s <= max_interval_s):
            raise ConfigError(
                f"max_interval_s must be at least min_interval_s ({min_interval_s:g} s), not {max_interval_s!r}"
            )
        self._overhead = overhead
        self._mtbf_s = mtbf_s
        self._min_interval_s = min_interval_s
        self._max_interval_s = math.inf if max_interval_s is None else max_interval_s
        self._clock = clock
        self._last_s: float | None = None
        self._last_step: int | None = None
        self._elapsed_s = 0.0
        self._quiet_steps_s: deque[float] = deque(maxlen=_NUM_STEPS)
        self._costs_s: deque[float] = deque(maxlen=_NUM_COSTS)
        self._last_cost_s = 0.0
        self._spent_s = 0.0
        self._num_saves = 0
        self._since_save_s = 0.0
        self._asked = False
        self._episode: _Episode | None = None

    def should_save(self, step: int, *, even_if_pending: bool = False) -> bool:
        """Whether to save now. Call once after every training step, with its number.

        A step number that did not grow by one (a resumed or skipped step) restarts the timing instead of being
        measured.
        """
        now = self._clock()
        if self._last_s is not None and self._last_step is not None and step == self._last_step + 1:
            self._observe(now - self._last_s)
        self._last_s, self._last_step = now, step
        self._asked = self._decide(even_if_pending)
        return self._asked

    def saved(self, pending: PendingCommit | None = None) -> None:
        """Tell that a save was made, right after `commit`; also when it was nobody's advice.

        Args:
            pending: what `commit` returned. None means a save that is finished already (a synchronous one).
        """
        self._asked = False
        if self._episode is None:
            self._episode = _Episode()
            self._since_save_s = 0.0
        self._episode.num_saves += 1
        self._num_saves += 1
        if pending is not None:
            self._episode.pending.append(pending)

    def skip_time(self) -> None:
        """Forget the time since the last step: it was no training (an evaluation, a pause). Call it right
        afterwards.
        """
        self._last_s = self._clock()

    def report(self) -> PacingReport:
        """What was measured so far."""
        return PacingReport(
            step_s=statistics.median(self._quiet_steps_s) if self._quiet_steps_s else None,
            cost_s=statistics.median(self._costs_s) if self._costs_s else None,
            interval_s=self._interval()[0] if self._costs_s else None,
            num_saves=self._num_saves,
            spent_s=self._spent_s,
            elapsed_s=self._elapsed_s,
        )

    def _observe(self, step_s: float) -> None:
        if self._asked and self._episode is None:
            # Asked, and not told of a save: if one was made, it ended within this step.
            self.saved()
        self._elapsed_s += step_s
        self._since_save_s += step_s
        episode = self._episode
        if episode is None:
            self._quiet_steps_s.append(step_s)
            return
        episode.steps_s += step_s
        episode.num_steps += 1
        if all(pending.done() for pending in episode.pending):
            self._episode = None
            self._settle(episode)

    def _settle(self, episode: _Episode) -> None:
        undisturbed_s = statistics.median(self._quiet_steps_s) if self._quiet_steps_s else 0.0
        slower_s = episode.steps_s - episode.num_steps * undisturbed_s
        stalled_s = sum(pending.metrics.stall_s for pending in episode.pending)
        # The stall is known exactly; noise in the step times must not make a save look cheaper than that.
        cost_s = max(slower_s, stalled_s, 0.0)
        self._spent_s += cost_s
        self._last_cost_s = cost_s
        self._costs_s.append(cost_s / episode.num_saves)
        # The save has paid for itself after that much training; what it cost is not training.
        self._since_save_s -= cost_s

    def _decide(self, even_if_pending: bool) -> bool:
        if self._episode is not None and not (even_if_pending and self._costs_s):
            return False
        if not self._costs_s:
            return len(self._quiet_steps_s) >= _NUM_FIRST_STEPS and self._elapsed_s >= self._min_interval_s
        step_s = statistics.median(self._quiet_steps_s) if self._quiet_steps_s else 0.0
        # Saves fall on step ends: take the nearest one for the optimum, never an earlier one for the budget.
        interval_s, is_budget = self._interval()
        return self._since_save_s >= interval_s - (0.0 if is_budget else step_s / 2)

    def _interval(self) -> tuple[float, bool]:
        """Training time between saves in seconds, and whether the budget demands it."""
        overhead, mtbf_s = self._overhead, self._mtbf_s
        budget_s = 0.0 if overhead is None else self._last_cost_s * (1 - overhead) / overhead
        optimum_s = 0.0 if mtbf_s is None else daly_interval_s(statistics.median(self._costs_s), mtbf_s)
        return min(self._max_interval_s, max(self._min_interval_s, budget_s, optimum_s)), budget_s >= optimum_s


@dataclass
class _Episode:
    """From a save until everything in flight has ended: the steps in between bear its cost."""

    pending: list[PendingCommit] = field(default_factory=list)
    num_saves: int = 0
    steps_s: float = 0.0
    num_steps: int = 0
