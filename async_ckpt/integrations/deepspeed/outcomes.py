"""How checkpoints ended, told to DeepSpeed on every rank alike: rank 0 says it, over the store of the commits; never a
collective."""

from __future__ import annotations

from collections import deque
from typing import Any

from ...engine.pending import PendingCommit
from ...errors import CheckpointError, RankFailedError
from ...ranks.exchange import Exchange
from ...ranks.rank_requests import Drop, Get, Put, Step, one
from ...ranks.store_link import StoreLink
from .waiting import Save, announce, forget


class Outcomes:
    """Saves that are over and whose outcome has not been reported yet. Training thread only.

    Guarantees: with the same calls in the same order, `begin` and `next` report the same checkpoints on every rank, and
    a failure of any rank is raised by the same call on all of them. RankFailedError: a rank did not come in time, or
    the store is lost.
    """

    def __init__(self, talk: StoreLink | None, patience_s: float) -> None:
        """`talk` is None for a single process. `patience_s`: how long a commit may take until its outcome is known."""
        self._talk = talk
        self._patience_s = patience_s
        self._beginnings = None if talk is None else Exchange(talk, "save_checkpoint", patience_s)
        self._waiting: deque[Save] = deque()
        self._num_saves = self._num_steps = self._num_steps_dropped = 0
        self._said_at_step = 0

    def begin(self, tag: str, max_pending: int) -> tuple[int, list[str]]:
        """A save begins: wait until fewer than `max_pending` commits are unfinished on rank 0, and until all ranks have
        come here; report what has ended on rank 0. Returns the save's number and the tags of all ranks.
        """
        number, self._num_saves = self._num_saves, self._num_saves + 1
        pending = self.pending()
        for oldest in pending[: max(0, len(pending) + 1 - max_pending)]:
            oldest.exception(self._patience_s)
        tags, num_ended = self._meet(tag, self._num_ended())
        while self._waiting and self._waiting[0].destination.number < num_ended:
            self._report(self._waiting.popleft())
        return number, tags

    def add(self, save: Save) -> None:
        """Its commit is on its way, or it was given up."""
        self._waiting.append(save)
        if not save.is_raised:
            announce(save)

    def pending(self) -> list[PendingCommit]:
        """Commits that have not ended on this rank, oldest first."""
        return [save.pending for save in self._waiting if save.pending is not None and not save.pending.done()]

    def report_last(self) -> None:
        """Wait for the one added last; raise its failure."""
        self._report(self._waiting.pop())

    def wait_all(self) -> None:
        """Wait for all of them; raise the first failure that was not raised yet. They stay to be reported."""
        first: CheckpointError | None = None
        for save in self._waiting:
            try:
                self._report(save)
            except CheckpointError as error:
                first = first or error
        if first is not None:
            raise first

    def next(self) -> Any:
        """The `info` of the oldest one if it has ended, else None; raises its failure. Does not wait for the disk."""
        if not self._waiting or self._ended_on_rank_0() <= self._waiting[0].destination.number:
            return None
        first = self._waiting.popleft()
        self._report(first)
        return first.info

    def _report(self, save: Save) -> None:
        """Wait for an outcome; raise it if it is a failure that was not raised yet."""
        if not save.is_raised and (error := save.loss()) is not None:
            save.is_raised = True
            forget(save)
            raise error

    def _num_ended(self) -> int:
        """All saves with smaller numbers have ended on this rank."""
        unfinished = (save for save in self._waiting if save.pending is not None and not save.pending.done())
        return next((save.destination.number for save in unfinished), self._num_saves)

    def _meet(self, tag: str, num_ended: int) -> tuple[list[str], int]:
        """The tags of all ranks, and rank 0's `num_ended`."""
        if self._talk is None or self._beginnings is None:
            return [tag], num_ended
        # Nearly always the same: then one stands for all.
        tags, num_ended_there = self._beginnings.round(
            tag, lambda tags: [tags if len(set(tags)) > 1 else tags[:1], num_ended]
        )
        if self._talk.info.rank == 0:
            # All ranks are here, so nobody asks again what was asked before.
            self._talk.later(_drop(range(self._num_steps_dropped, self._num_steps)))
            self._num_steps_dropped = self._num_steps
        return tags if len(tags) > 1 else tags * self._talk.info.world_size, num_ended_there

    def _ended_on_rank_0(self) -> int:
        """What rank 0's `_num_ended` was at its previous step (0 at the first): the answer is there already unless rank
        0 is more than one step behind, so that nobody waits for anybody.
        """
        if self._talk is None:
            return self._num_ended()
        n, self._num_steps = self._num_steps, self._num_steps + 1
        if self._talk.info.rank == 0:
            answer, self._said_at_step = self._said_at_step, self._num_ended()
            self._talk.ask(one(Put(f"step/{n + 1}", str(self._said_at_step))))
            return answer
        said = "0" if n == 0 else self._talk.ask(one(Get(f"step/{n}", self._patience_s)))
        if said is None:
            raise RankFailedError(
                f"rank 0 has not come to this step within {self._patience_s:g} s", rank=0, step="step"
            )
        return int(said)


def _drop(steps: range) -> Step:
    for n in steps:
        yield Drop(f"step/{n}")
