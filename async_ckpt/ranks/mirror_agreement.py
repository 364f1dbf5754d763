"""How the ranks agree that a checkpoint's objects are all in a mirror: over the store that the rename is agreed on.

Keys, below the run's prefix; a name stands for one checkpoint in one mirror, n is the node, where each has a root of
its own:

- "mirror/n/<name>/part/r": rank r's objects are there; set once, also where the upload is tried again. "count": how
  many.
- "gate": wakes the leader: all are there. "result": what the leader's last try came to. "seen": how many have read
  the success.
"""

from __future__ import annotations

import itertools

from ..errors import MirrorError, RankFailedError
from .rank_requests import Add, AwaitCount, Drop, Get, Put, Step, one
from .store_link import StoreLink


class MirrorAgreement:
    """A `mirror.context.Agreement`. Any thread; blocks."""

    def __init__(self, talk: StoreLink) -> None:
        self._info = info = talk.info
        self.rank: int | None = info.rank
        self.leads = info.leads
        self._talk = talk
        self._reported: set[str] = set()
        self._last_results: dict[str, str] = {}
        self._tries = itertools.count()

    def all_sent(self, name: str) -> None:
        """This rank's objects are there. Returns on the leader when all ranks have said so, on the others when the
        manifest is there.

        Raises:
            RankFailedError: not within the time; names the ranks that were not heard of.
            MirrorError: the leader could not put the manifest.
        """
        key = f"mirror/{self._info.node}/{name}"
        if name not in self._reported:
            self._talk.ask(self._report(key))
            self._reported.add(name)
        if self.leads:
            self._talk.ask(self._gather(key))
            return
        result = self._talk.ask(self._learn(key, self._last_results.get(name)))
        self._last_results[name] = result
        error = result.partition(":")[2]
        if error:
            raise MirrorError(f"rank {self._info.group[0]} could not put the manifest: {error}", url=name)
        self._forget(name)

    def concluded(self, name: str, error: str) -> None:
        """The leader tells the others that the manifest is there, or why it is not."""
        key = f"mirror/{self._info.node}/{name}"
        self._talk.ask(one(Put(f"{key}/result", f"{next(self._tries)}:{error}")))
        if not error:
            self._forget(name)
            self._talk.later(self._tidy(key))

    def _forget(self, name: str) -> None:
        self._reported.discard(name)
        self._last_results.pop(name, None)

    def _report(self, key: str) -> Step:
        yield Put(f"{key}/part/{self._info.rank}", "there")
        if (yield Add(f"{key}/count")) == len(self._info.group):
            yield Put(f"{key}/gate", "full")

    def _gather(self, key: str) -> Step:
        if (yield Get(f"{key}/gate", self._info.timeout_s)) is None:
            missing = []
            for rank in self._info.group:
                if (yield Get(f"{key}/part/{rank}")) is None:
                    missing.append(rank)
            named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            raise RankFailedError(
                f"rank(s) {named} have not mirrored their files within {self._info.timeout_s:g} s; the manifest is not "
                "put. The checkpoint is whole on disk",
                rank=missing[0] if missing else None,
                step="mirror",
            )

    def _learn(self, key: str, known: str | None) -> Step:
        result = yield Get(f"{key}/result", self._info.timeout_s, known)
        if result is None:
            raise RankFailedError(
                f"rank {self._info.group[0]} has not put the manifest within {self._info.timeout_s:g} s; the "
                "checkpoint is whole on disk",
                rank=self._info.group[0],
                step="mirror",
            )
        if not result.partition(":")[2]:
            yield Add(f"{key}/seen")
        return result

    def _tidy(self, key: str) -> Step:
        yield AwaitCount(f"{key}/seen", len(self._info.group) - 1, self._info.timeout_s)
        for name in ("count", "gate", "result", "seen", *(f"part/{rank}" for rank in self._info.group)):
            yield Drop(f"{key}/{name}")
