"""How another rank finds the attempt that rank 0 has begun for its tag: steps of the protocol, see `protocol`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .protocol import fail, settle
from .rank_requests import AttemptFailed, Await, CommitOutcome, Drop, Get, Put, RankInfo, Step

DISAGREE_S = 5.0
"""How long after rank 0 another rank may begin a checkpoint if it has begun another one first."""


@dataclass
class Announcements:
    """What this rank has read of rank 0's announcements and not used yet."""

    last: int = 0
    waiting: dict[str, list[tuple[int, dict[str, Any]]]] = field(default_factory=dict)
    in_vain: str = ""
    """The tag that this rank has waited for last, and that rank 0 never began."""

    MAX_KEPT = 64

    def add(self, attempt: int, announcement: dict[str, Any]) -> None:
        self.waiting.setdefault(announcement["tag"], []).append((attempt, announcement))
        while len(self.waiting) > self.MAX_KEPT:
            del self.waiting[next(iter(self.waiting))]

    def take(self, tag: str) -> tuple[int, dict[str, Any]] | None:
        queue = self.waiting.get(tag)
        if not queue:
            return None
        first = queue.pop(0)
        if not queue:
            del self.waiting[tag]
        return first


def join(info: RankInfo, tag: str, known: Announcements) -> Step:
    """Another rank: wait until rank 0 has begun `tag`; returns the attempt and its announcement.

    Raises:
        AttemptFailed: rank 0 did not begin this tag in time or could not, or the jobs differ in size.
    """
    patience_s = info.timeout_s
    grace_s = min(1.0, patience_s / 4)
    noted = disputed = False
    ended: AttemptFailed | None = None
    while True:
        found, ended = yield from _next_open(info, tag, known, ended)
        if found is not None:
            break
        patience = patience_s if noted and ended is None else grace_s
        if noted and (known.waiting or disputed):
            patience = min(patience, DISAGREE_S)
        head = yield Await("head", patience, str(known.last) if known.last else None)
        if head is not None:
            yield from _read_announcements(known, int(head))
        elif ended is not None:
            # Not an older try whose successor is about to be announced: this very attempt failed before we came.
            raise ended
        elif noted and known.waiting and not disputed:
            # Rank 0 waits for us there, as we wait for it here: none of us would end before its timeout.
            refused = yield from _refuse_waiting(info, known, f"it has opened tag {tag!r} instead")
            disputed, newest = bool(refused), ", ".join(map(repr, refused[-3:]))
        elif noted:
            known.in_vain = tag
            cause = f"rank 0 has not opened tag {tag!r} within {info.timeout_s:g} s"
            if disputed:
                cause = f"rank 0 has opened tag {newest}, not {tag!r}"
            raise AttemptFailed(None, CommitOutcome(False, 0, cause, info.rank))
        else:
            noted = True
            patience_s -= grace_s
            in_vain = f", after it has waited in vain for tag {known.in_vain!r}" if known.in_vain else ""
            yield Put(f"note/{info.rank}", f"it waits for tag {tag!r}{in_vain}")
    if noted or known.in_vain:
        known.in_vain = ""
        yield Drop(f"note/{info.rank}")
    attempt, announcement = found
    if announcement["error"]:
        raise AttemptFailed(attempt, CommitOutcome(False, 0, announcement["error"], 0))
    if (announcement["world_size"], announcement["num_nodes"]) != (info.world_size, info.num_nodes):
        theirs = f"{announcement['world_size']} on {announcement['num_nodes']}"
        cause = f"it counts {info.world_size} ranks on {info.num_nodes} nodes, rank 0 counts {theirs}"
        raise AttemptFailed(attempt, (yield from fail(info, attempt, cause)))
    return attempt, announcement


def _refuse_waiting(info: RankInfo, known: Announcements, cause: str) -> Step:
    """Give up, for all ranks, what rank 0 has announced and this rank has not begun; returns the tags of what had not
    ended by itself.
    """
    waiting, known.waiting = known.waiting, {}
    refused = []
    for attempt, announcement in (found for queue in waiting.values() for found in queue):
        if (yield Get(f"{attempt}/result")) is None and (yield Get(f"{attempt}/open")) is not None:
            yield from fail(info, attempt, cause)
            refused.append(announcement["tag"])
        yield from settle(info, attempt)
    return refused


def _next_open(info: RankInfo, tag: str, known: Announcements, ended: AttemptFailed | None) -> Step:
    """The oldest announced attempt of `tag` that has not ended, or None; and the newest one that has failed, `ended`
    being the newest until now. This rank has no part in those that another one has followed.
    """
    while (found := known.take(tag)) is not None:
        attempt, announcement = found
        raw = None if announcement["error"] else (yield Get(f"{attempt}/result"))
        if ended is not None and ended.attempt is not None:
            yield from settle(info, ended.attempt)
        if raw is None:
            return found, None
        outcome = CommitOutcome.decode(raw)
        ended = None if outcome.ok else AttemptFailed(attempt, outcome)
    return None, ended


def _read_announcements(known: Announcements, head: int) -> Step:
    if not known.last:
        # A rank that starts late has no part in what was begun long before.
        known.last = max(0, head - Announcements.MAX_KEPT)
    while known.last < head:
        known.last += 1
        raw = yield Get(f"{known.last}/open")
        if raw is not None:
            known.add(known.last, json.loads(raw))
