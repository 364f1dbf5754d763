"""How all ranks give DeepSpeed the same answer: rank 0 tells it, over a store; never a collective.

Guarantees:
- The n-th question gets rank 0's n-th answer on every rank, whatever the ranks know themselves at that moment.
- Only the caller's thread is used. Keys of questions that every rank is done with are deleted.
"""

from __future__ import annotations

import json
import time
from typing import Protocol

from ...errors import RankFailedError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.02


class Store(Protocol):
    """What is used of a ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...
    def delete_key(self, key: str) -> bool: ...


def await_values(store: Store, keys: list[str], timeout_s: float, what: str) -> list[str]:
    """The values of `keys`, once they are there. Polls: a blocking `get` would hold the store's connection against
    other threads.

    Raises:
        RankFailedError: one was not set in time, or the store is gone; says that `what` was not told, and names the
            first key.
    """
    deadline, pause_s = time.monotonic() + timeout_s, _FIRST_PAUSE_S
    try:
        while not store.check(keys):
            if time.monotonic() > deadline:
                missing = next((key for key in keys if not store.check([key])), keys[0])
                raise RankFailedError(f"{what} was not told within {timeout_s:g} s ({missing})", rank=None)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return [store.get(key).decode() for key in keys]
    except RuntimeError as error:
        raise RankFailedError(f"the store is gone, so {what} was not told: {error}", rank=None) from error


class Agreement:
    """Questions that are asked on all ranks in the same order."""

    def __init__(self, store: Store | None, rank: int, world_size: int, timeout_s: float) -> None:
        """`store` is None for a single process."""
        self._store = store
        self._rank = rank
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._num_asked = {"now": 0, "ahead": 0, "each": 0}
        self._num_deleted = {"now": 0, "ahead": 0, "each": 0}
        self._said_ahead = 0

    def now(self, mine: int) -> int:
        """Rank 0's `mine`. Others wait until rank 0 has come here too."""
        n = self._next("now")
        if self._rank == 0:
            self._say("now", n, mine)
            return mine
        return self._hear("now", n)

    def each(self, mine: str) -> list[str]:
        """What every rank says, by rank. Waits until all of them have come here."""
        n = self._next("each")
        if self._store is None:
            return [mine]
        keys = [f"each/{n}/{rank}" for rank in range(self._world_size)]
        self._store.set(keys[self._rank], mine)
        if self._rank == 0:
            said = await_values(self._store, keys, self._timeout_s, "which tag each rank saves under")
            # Nearly always the same: then one stands for all.
            self._store.set(f"each/{n}", json.dumps(said if len(set(said)) > 1 else said[:1]))
            for key in keys:
                self._store.delete_key(key)
            return said
        (heard,) = await_values(self._store, [f"each/{n}"], self._timeout_s, "which tag each rank saves under")
        all_said: list[str] = json.loads(heard)
        return all_said if len(all_said) > 1 else all_said * self._world_size

    def ahead(self, mine: int) -> int:
        """What rank 0's `mine` was at its previous question (0 at the first).

        So the answer is there already unless rank 0 is more than one question behind: nobody waits for anybody.
        """
        n = self._next("ahead")
        if self._store is None:
            return mine
        if self._rank == 0:
            answer, self._said_ahead = self._said_ahead, mine
            self._say("ahead", n + 1, mine)
            return answer
        return 0 if n == 0 else self._hear("ahead", n)

    def mark(self) -> dict[str, int]:
        """How much has been asked until now; for `forget`."""
        return dict(self._num_asked)

    def forget(self, mark: dict[str, int]) -> None:
        """Delete the keys of questions before `mark`: the caller knows that every rank has passed it."""
        if self._store is None or self._rank != 0:
            return
        for kind, num in mark.items():
            for n in range(self._num_deleted[kind], num):
                self._store.delete_key(f"{kind}/{n}")
            self._num_deleted[kind] = max(num, self._num_deleted[kind])

    def _next(self, kind: str) -> int:
        n = self._num_asked[kind]
        self._num_asked[kind] = n + 1
        return n

    def _say(self, kind: str, n: int, value: int) -> None:
        if self._store is not None:
            self._store.set(f"{kind}/{n}", str(value))

    def _hear(self, kind: str, n: int) -> int:
        assert self._store is not None
        (heard,) = await_values(self._store, [f"{kind}/{n}"], self._timeout_s, "which checkpoints have ended")
        return int(heard)
