"""How all ranks give DeepSpeed the same answer: rank 0 tells it, over the store of the commits; never a collective."""

from __future__ import annotations

from typing import Any

from ...errors import RankFailedError
from ...ranks.exchange import Exchange
from ...ranks.rank_requests import Drop, Get, Put, Step
from ...ranks.store_link import StoreLink


class Agreement:
    """Questions that are asked on all ranks in the same order. Training thread."""

    def __init__(self, talk: StoreLink | None, timeout_s: float) -> None:
        """`talk` is None for a single process."""
        self._talk = talk
        self._timeout_s = timeout_s
        self._saves = None if talk is None else Exchange(talk, "save_checkpoint", timeout_s)
        self._num_steps = self._num_steps_dropped = 0
        self._said_at_step = 0

    def at_save(self, tag: str, num_ended: int) -> tuple[list[str], int]:
        """The tags of all ranks, and rank 0's `num_ended`. Waits until all of them have come here.

        Raises:
            RankFailedError: a rank did not come in time, or the store is lost.
        """
        if self._saves is None:
            return [tag], num_ended

        def answer_of(tags: list[Any]) -> Any:
            # Nearly always the same: then one stands for all.
            return [tags if len(set(tags)) > 1 else tags[:1], num_ended]

        tags, num_ended = self._saves.round(tag, answer_of)
        assert self._talk is not None
        if self._talk.info.rank == 0:
            # All ranks are here, so nobody asks again what was asked before.
            self._talk.later(self._drop(range(self._num_steps_dropped, self._num_steps)))
            self._num_steps_dropped = self._num_steps
        return tags if len(tags) > 1 else tags * self._talk.info.world_size, num_ended

    def at_step(self, num_ended: int) -> int:
        """What rank 0's `num_ended` was at its previous step (0 at the first).

        So the answer is there already unless rank 0 is more than one step behind: nobody waits for anybody.

        Raises:
            RankFailedError: rank 0 did not come in time, or the store is lost.
        """
        if self._talk is None:
            return num_ended
        n, self._num_steps = self._num_steps, self._num_steps + 1
        if self._talk.info.rank == 0:
            answer, self._said_at_step = self._said_at_step, num_ended
            self._talk.ask(self._say(n + 1, num_ended))
            return answer
        return 0 if n == 0 else int(self._talk.ask(self._hear(n)))

    def _say(self, n: int, num_ended: int) -> Step:
        yield Put(f"step/{n}", str(num_ended))

    def _hear(self, n: int) -> Step:
        said = yield Get(f"step/{n}", self._timeout_s)
        if said is None:
            raise RankFailedError(f"rank 0 has not come to this step within {self._timeout_s:g} s", rank=0, step="step")
        return said

    def _drop(self, steps: range) -> Step:
        for n in steps:
            yield Drop(f"step/{n}")
