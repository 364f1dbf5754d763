"""How checkpoints ended, told to DeepSpeed on every rank alike."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

from ...engine.pending import PendingCommit
from ...errors import CheckpointError
from .agreement import Agreement
from .waiting import SavedCheckpoint, announce, forget


class Outcomes:
    """Checkpoints whose saves are over and whose outcome has not been reported yet. Training thread only.

    Guarantees: with the same calls in the same order, `open_next` and `next` report the same checkpoints on every
    rank, and a failure of any rank is raised by the same call on all of them.
    """

    def __init__(self, agreement: Agreement, patience_s: float) -> None:
        """`patience_s`: how long a commit may take until its outcome is known here."""
        self._agreement = agreement
        self._patience_s = patience_s
        self._waiting: deque[SavedCheckpoint] = deque()
        self._num_added = 0

    def open_next(self, tag: str, max_pending: int) -> list[str]:
        """A save begins: wait until fewer than `max_pending` commits are unfinished on rank 0, and report what has
        ended there; returns the tags of all ranks.
        """
        pending = self.pending()
        for oldest in pending[: max(0, len(pending) + 1 - max_pending)]:
            oldest.exception(self._patience_s)
        tags, num_ended = self._agreement.at_save(tag, self._num_ended())
        while self._waiting and self._waiting[0].number < num_ended:
            self._report(self._waiting.popleft())
        return tags

    def add(
        self,
        info: Any,
        folder: str,
        pending: PendingCommit | None,
        error: BaseException | None = None,
        *,
        is_raised: bool = False,
    ) -> None:
        """`pending` is on its way to `folder`; without one the checkpoint was given up because of `error`."""
        real = os.path.realpath(folder)
        saved = SavedCheckpoint(self._num_added, info, real, pending, error, is_raised, self._patience_s)
        self._waiting.append(saved)
        self._num_added += 1
        if not is_raised:
            announce(saved)

    def pending(self) -> list[PendingCommit]:
        """Commits that have not ended on this rank, oldest first."""
        found = (outcome.pending for outcome in self._waiting)
        return [pending for pending in found if pending is not None and not pending.done()]

    def report_last(self) -> None:
        """Wait for the one added last; raise its failure."""
        self._report(self._waiting.pop())

    def wait_all(self) -> None:
        """Wait for all of them; raise the first failure that was not raised yet. They stay to be reported."""
        first: CheckpointError | None = None
        for outcome in self._waiting:
            try:
                self._report(outcome)
            except CheckpointError as error:
                first = first or error
        if first is not None:
            raise first

    def next(self) -> Any:
        """The `info` of the oldest one if it has ended, else None; raises its failure. Does not wait for the disk."""
        if not self._waiting or self._agreement.at_step(self._num_ended()) <= self._waiting[0].number:
            return None
        first = self._waiting.popleft()
        self._report(first)
        return first.info

    def _report(self, outcome: SavedCheckpoint) -> None:
        """Wait for an outcome; raise it if it is a failure that was not raised yet."""
        if outcome.is_raised:
            return
        error = outcome.loss()
        if error is not None:
            outcome.is_raised = True
            forget(outcome)
            raise error

    def _num_ended(self) -> int:
        """All with smaller numbers have ended on this rank."""
        for outcome in self._waiting:
            if outcome.pending is not None and not outcome.pending.done():
                return outcome.number
        return self._num_added
