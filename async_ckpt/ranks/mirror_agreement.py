"""How the ranks agree that a checkpoint's objects are all in a mirror: over the store that the rename is agreed on.

Keys, below the run's prefix; a name stands for one checkpoint in one mirror, n is the node, where each has a root of
its own:

- "mirror/n/<name>/part/r": rank r's objects are there, set again where the upload is tried again. "result": what the
  leader's last try came to. "seen": how many have read the success.
"""

from __future__ import annotations

import itertools

from ..errors import MirrorError, RankFailedError, some_of
from .exchange import hear
from .rank_requests import Add, AwaitCount, Drop, Get, Put, Step, one
from .store_link import StoreLink


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
