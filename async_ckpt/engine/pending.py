"""The pending commit: one object with a blocking face and an awaitable one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..metrics import CommitMetrics
from ..mirror.pending import PendingMirror
from ..threads.outcome import Pending, run_guarded


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


async def those_before_have_ended(tag: str, commits: Sequence[PendingCommit]) -> None:
    """Wait for the commits before the unfinished one of `tag`; for all, where that was not called yet."""
    own = next((k for k, pending in enumerate(commits) if pending.tag == tag and not pending.done()), len(commits))
    for pending in commits[:own]:
        await pending.ended()
