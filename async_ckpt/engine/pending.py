"""The pending commit: one object with a blocking face and an awaitable one. And what its failure amounts to: an error,
or a warning as long as few of them fail in a row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import CommitError, ConfigError, check_int, is_number
from ..metrics import CommitMetrics
from ..mirror.pending import PendingMirror
from ..threads.outcome import Pending, run_guarded

_now_s = time.time


class PendingCommit(Pending):
    """A commit on its way to the disk: resolves to the tag when the checkpoint is durable and visible. See `Pending`.

    A failure that nobody has asked for is raised by the engine's next `create` and when the engine is closed; see
    `Tolerate` for the other way.
    """

    def __init__(
        self,
        tag: str,
        metrics: CommitMetrics,
        waiting_for: Callable[[], str],
        run_callback: Callable[[Callable[[], object]], object] = run_guarded,
    ) -> None:
        super().__init__(tag, run_callback)
        self.metrics = metrics
        self.mirrored: PendingMirror | None = None
        """The same checkpoint on its way to the engine's mirrors; None where it has none."""
        self.verdict: BaseException | None = None
        """What its failure is raised as; None where it is committed, or its failure is tolerated."""
        self.is_owed = False
        """Whether the engine has still to raise that."""
        self.row: tuple[str, ...] = ()
        """The failures in a row up to its own, where some are tolerated."""
        self.row_began_s = 0.0
        self.warning = ""
        """What is told of its failure where that is tolerated."""
        self._waiting_for = waiting_for

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        if self.verdict is error:
            self.is_owed = False
        return error

    def loss(self, timeout: float | None = None) -> BaseException | None:
        """As `exception`, but what is to be raised, and by the engine no more: nothing where failures are tolerated,
        and all those in a row where they were too many.
        """
        self.exception(timeout)
        self.is_owed = False
        return self.verdict

    def _still_waits(self, what: str) -> str:
        return (
            f"commit of {self.tag!r} {what}; it waits for {self._waiting_for()}. Nothing is visible under this tag yet"
        )


@dataclass(frozen=True)
class Tolerate:
    """Lets training go on after a failed commit: a warning, until `consecutive` of them have failed in a row.

    The row is that of the `commit` calls, the same on all ranks; a commit that succeeds ends it. The last one of the
    row, and every one after it, is raised by the next `create` or `commit` or by `close`, as a `CommitError` that tells
    of all of them.

    Raises:
        ConfigError: a field has a wrong type, unit or range.
    """

    consecutive: int = 2
    """Which failed commit in a row is raised: the second one tolerates a single failure. 1 tolerates none."""

    within_s: float = 3600.0
    """For how long a row is tolerated, in seconds: what fails later than that after the first of its row is raised,
    whatever its number."""

    def __post_init__(self) -> None:
        check_int("Tolerate: consecutive", self.consecutive)
        if not is_number(self.within_s) or not self.within_s > 0:
            raise ConfigError(f"Tolerate: within_s must be a positive number of seconds, not {self.within_s!r}")

    async def judge(
        self, pending: PendingCommit, error: BaseException, commits: list[PendingCommit], ended_s: float | None
    ) -> None:
        """Decide what `error`, of which `pending` is about to fail, amounts to. Waits for the commits before it.

        Args:
            commits: in the order of their calls; `pending` may be missing as the last one.
            ended_s: when it failed, where all ranks know that alike: else one could go on where another raises.
        """
        before = commits[: commits.index(pending)] if pending in commits else commits
        if before:
            await before[-1].ended()
        newest = next((one.tag for one in reversed(commits) if one.done() and one.failure() is None), None)
        row, now_s = before[-1].row if before else (), _now_s() if ended_s is None else ended_s
        pending.row = (*row, f"{pending.tag!r}: {error}")
        pending.row_began_s = before[-1].row_began_s if row else now_s
        pending.metrics.num_failed_in_a_row = num_failed = len(pending.row)
        lasted_s = now_s - pending.row_began_s
        kept = "older checkpoints stay" if newest is None else f"checkpoint {newest!r} is committed and stays"
        if num_failed < self.consecutive and lasted_s <= self.within_s:
            pending.warning = (
                f"checkpoint {pending.tag!r} was not committed, which is tolerated: {num_failed} failed in a row, "
                f"{self.consecutive} are an error; {kept}, training goes on ({error})"
            )
            return
        pending.verdict, pending.is_owed = error, True
        if num_failed > 1:
            pending.verdict = CommitError(
                f"{num_failed} checkpoints in a row, within {lasted_s:.0f} s, were not committed, which is more than "
                f"{self} allows; {kept}. {'; '.join(pending.row)}",
                step="commit",
                errno=error.errno if isinstance(error, OSError) else None,
                committed=error.committed if isinstance(error, CommitError) else False,
            )
            pending.verdict.__cause__ = error
