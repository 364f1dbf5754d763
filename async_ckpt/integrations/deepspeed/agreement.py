"""How all ranks give DeepSpeed the same answer: rank 0 tells it, over the store of the commits; never a collective.

The n-th question gets rank 0's n-th answer on every rank, whatever the ranks know themselves at that moment.

Keys, below the run's prefix: "save/n/r": the tag that rank r saves under. "save/n", "step/n": rank 0's answers. They
are deleted at the next save.
"""

from __future__ import annotations

import json

from ...errors import RankFailedError
from ...ranks.rank_requests import Await, Drop, Put, Step, one
from ...ranks.rank_talk import RankTalk


class Agreement:
    """Questions that are asked on all ranks in the same order. Training thread."""

    def __init__(self, talk: RankTalk | None, timeout_s: float) -> None:
        """`talk` is None for a single process."""
        self._talk = talk
        self._timeout_s = timeout_s
        self._num_saves = self._num_steps = 0
        self._num_steps_dropped = 0
        self._said_at_step = 0

    def at_save(self, tag: str, num_ended: int) -> tuple[list[str], int]:
        """The tags of all ranks, and rank 0's `num_ended`. Waits until all of them have come here.

        Raises:
            RankFailedError: a rank did not come in time, or the store is lost.
        """
        if self._talk is None:
            return [tag], num_ended
        self._num_saves += 1
        tags, num_ended = self._talk.ask(self._gather_tags(tag, num_ended))
        return tags, num_ended

    def at_step(self, num_ended: int) -> int:
        """What rank 0's `num_ended` was at its previous step (0 at the first).

        So the answer is there already unless rank 0 is more than one step behind: nobody waits for anybody.
        """
        if self._talk is None:
            return num_ended
        n, self._num_steps = self._num_steps, self._num_steps + 1
        if self._talk.info.rank == 0:
            answer, self._said_at_step = self._said_at_step, num_ended
            self._talk.ask(one(Put(f"step/{n + 1}", str(num_ended))))
            return answer
        return 0 if n == 0 else int(self._talk.ask(self._hear(f"step/{n}", 0)))

    def _gather_tags(self, tag: str, num_ended: int) -> Step:
        assert self._talk is not None
        info, n = self._talk.info, self._num_saves
        if info.rank == 0:
            tags = [tag]
            for rank in range(1, info.world_size):
                tags.append((yield from self._hear(f"save/{n}/{rank}", rank)))
                yield Drop(f"save/{n}/{rank}")
            # Nearly always the same: then one stands for all.
            yield Put(f"save/{n}", json.dumps([tags if len(set(tags)) > 1 else tags[:1], num_ended]))
            # All ranks are here, so nobody asks again what was asked before.
            yield Drop(f"save/{n - 1}")
            for step in range(self._num_steps_dropped, self._num_steps):
                yield Drop(f"step/{step}")
            self._num_steps_dropped = self._num_steps
            return tags, num_ended
        yield Put(f"save/{n}/{info.rank}", tag)
        tags, num_ended = json.loads((yield from self._hear(f"save/{n}", 0)))
        return tags if len(tags) > 1 else tags * info.world_size, num_ended

    def _hear(self, key: str, rank: int) -> Step:
        """The value of a key that `rank` sets."""
        said = yield Await(key, self._timeout_s)
        if said is None:
            kind = key.partition("/")[0]
            raise RankFailedError(
                f"rank {rank} has not come to this {kind} within {self._timeout_s:g} s", rank=rank, step=kind
            )
        return said
