"""What ranks agree on over the store besides their commits.

An exchange is a question to all ranks at once: each says something, rank 0 makes one answer of it, and all get that
answer. Keys, below the run's prefix; q counts the questions of one exchange, n the rounds of one question:
"<name>/q/n/r": what rank r says. "<name>/q/n": the answer, until the next round.

A mirror's leader is told when all objects of a checkpoint are there, and tells when its manifest is. Keys; a name
stands for one checkpoint in one mirror, n is the node, where each has a root of its own: "mirror/n/<name>/part/r":
rank r's objects are there, set again where the upload is tried again. "result": what the leader's last try came to.
"seen": how many have read the success.

Guarantees of an exchange:
- Ranks that get an answer get the same one. Some may raise where others get it: those that gave up waiting, and those
  that lost the store.
- A rank that gave up in the middle of a question is in step with the others again at the next one.
- Constant number of requests per rank; rank 0 has two more per rank. Every wait is bounded by twice `timeout_s`.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import MirrorError, RankFailedError, some_of
from .rank_requests import Add, AwaitCount, Drop, Get, Put, Step, one
from .store_link import StoreLink


def hear(key: str, ranks: Iterable[int], timeout_s: float) -> Step:
    """What each of these ranks has said below `key`, by rank; None where that did not come within the time."""
    said: dict[int, str | None] = {}
    end_s = time.monotonic() + timeout_s
    for rank in ranks:
        said[rank] = yield Get(f"{key}/{rank}", max(0.0, end_s - time.monotonic()))
    return said


class Exchange:
    """Questions that all ranks ask in the same order, in one round or several. One thread at a time; blocks for the
    slowest rank."""

    def __init__(self, link: StoreLink, name: str, timeout_s: float) -> None:
        self._link = link
        self._name = name
        self._timeout_s = timeout_s
        self._num_questions = self._num_rounds = 0
        self._answered = ""

    def begin(self) -> None:
        """The next rounds are of a new question."""
        self._num_questions, self._num_rounds = self._num_questions + 1, 0

    def round(self, mine: Any, answer_of: Callable[[list[Any]], Any]) -> Any:
        """Say `mine`; what rank 0's `answer_of` makes of all that was said, by rank. Both are JSON values.

        Raises:
            RankFailedError: a rank did not come in time, or the store is lost; or what rank 0's `answer_of` raises.
        """
        self._num_rounds += 1
        said = self._link.ask(self._round(mine, answer_of))
        if "error" in said:
            raise RankFailedError(said["error"], rank=said["rank"], step=self._name)
        return said["answer"]

    def _round(self, mine: Any, answer_of: Callable[[list[Any]], Any]) -> Step:
        info, key = self._link.info, f"{self._name}/{self._num_questions}/{self._num_rounds}"
        if info.rank != 0:
            yield Put(f"{key}/{info.rank}", json.dumps(mine))
            # A round lasts as long as the slowest rank, which rank 0 gives `timeout_s`.
            raw = yield Get(key, 2 * self._timeout_s)
            return {"error": self._silent(0), "rank": 0} if raw is None else json.loads(raw)
        said = yield from hear(key, range(1, info.world_size), self._timeout_s)
        silent = [rank for rank, word in said.items() if word is None]
        for rank in said.keys() - silent:
            yield Drop(f"{key}/{rank}")
        try:
            if silent:
                raise RankFailedError(self._silent(silent[0]), rank=silent[0])
            told = {"answer": answer_of([mine, *map(json.loads, said.values())])}
            # All ranks are here, so all know the answer before.
            if self._answered:
                yield Drop(self._answered)
        except RankFailedError as error:
            told = {"error": error.message, "rank": error.rank}
        yield Put(key, json.dumps(told))
        self._answered = key
        return told

    def _silent(self, rank: int) -> str:
        return f"rank {rank} has not answered within {self._timeout_s:g} s; every rank must ask for {self._name!r}"


class MirrorAgreement:
    """A `mirror.context.Agreement`. Any thread; blocks."""

    def __init__(self, link: StoreLink) -> None:
        self._link = link
        self._info = info = link.info
        self.rank: int | None = info.rank
        self.leads = info.leads
        self._last_results: dict[str, str] = {}
        self._tries = itertools.count()

    def all_sent(self, name: str) -> None:
        """See `Agreement`. Raises MirrorError too: the leader could not put the manifest."""
        info, key, first = self._info, self._key(name), self._info.group[0]
        self._link.ask(one(Put(f"{key}/part/{info.rank}", "there")))
        if self.leads:
            said = self._link.ask(hear(f"{key}/part", info.group, info.timeout_s))
            missing = [rank for rank, word in said.items() if word is None]
            if missing:
                raise RankFailedError(
                    f"rank(s) {some_of([*map(str, missing)], 8)} have not mirrored their files within "
                    f"{info.timeout_s:g} s; the manifest is not put. The checkpoint is whole on disk",
                    rank=missing[0],
                    step="mirror",
                )
            return
        result = self._link.ask(one(Get(f"{key}/result", info.timeout_s, self._last_results.get(name))))
        if result is None:
            told = f"rank {first} has not put the manifest within {info.timeout_s:g} s; the checkpoint is whole on disk"
            raise RankFailedError(told, rank=first, step="mirror")
        self._last_results[name] = result
        error = result.partition(":")[2]
        if error:
            raise MirrorError(f"rank {first} could not put the manifest: {error}", url=name)
        self._link.ask(one(Add(f"{key}/seen")))
        del self._last_results[name]

    def concluded(self, name: str, error: str) -> None:
        """The leader tells the others that the manifest is there, or why it is not."""
        key = self._key(name)
        self._link.ask(one(Put(f"{key}/result", f"{next(self._tries)}:{error}")))
        if not error:
            self._link.later(self._tidy(key))

    def _key(self, name: str) -> str:
        return f"mirror/{self._info.node}/{name}"

    def _tidy(self, key: str) -> Step:
        yield AwaitCount(f"{key}/seen", len(self._info.group) - 1, self._info.timeout_s)
        for name in ("result", "seen", *(f"part/{rank}" for rank in self._info.group)):
            yield Drop(f"{key}/{name}")
