"""The pending commit: one object with a blocking face and an awaitable one."""

from __future__ import annotations

from collections.abc import Callable

from ..metrics import CommitMetrics
from ..mirror.pending import PendingMirror
from ..threads.pending import Pending, run_guarded


class PendingCommit(Pending):
    """A commit on its way to the disk: resolves to the tag when the checkpoint is durable and visible. See `Pending`.

    A failure that nobody has asked for is raised by the engine's next `create` and when the engine is closed.
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
        self._waiting_for = waiting_for

    def _still_waits(self, what: str) -> str:
        return (
            f"commit of {self.tag!r} {what}; it waits for {self._waiting_for()}. Nothing is visible under this tag yet"
        )
