"""How a rank gets into the attempt that rank 0 has begun for its tag, and how it tells the others where it cannot."""

from __future__ import annotations

import json
import os
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..errors import CheckpointError
from ..storage import transaction
from ..storage.filesystem import FileSystem
from ..storage.staged import Staging
from . import protocol as rank_protocol
from .rank_requests import AttemptFailed, CommitOutcome, Drop, Get, Put, RankInfo, Step, cause_of
from .store_link import LinkLostError, StoreLink

DISAGREE_S = 5.0
"""How long after rank 0 another rank may begin a checkpoint if it has begun another one first."""
_MAX_KEPT = 64


@dataclass(eq=False)
class RankStaging(Staging):
    """A checkpoint that this rank stages with others."""

    attempt: Future[int] = field(default_factory=Future)
    outcome: CommitOutcome | None = None
    """How it ended, once this rank has learnt it."""

    def ended_by(self, error: BaseException, rank: int, *, reported: bool = False) -> BaseException:
        """A step's failure, as what `commit` raises; `reported`: the others may publish without this rank."""
        if isinstance(error, AttemptFailed):
            self.outcome = outcome = error.outcome
        elif isinstance(error, LinkLostError):
            outcome = CommitOutcome(False, None, str(error), rank, None if reported else False)
        else:
            return error
        told = outcome.error(self.destination.root, self.tag)
        told.__cause__ = error
        return told


class Announcements:
    """What another rank has read of rank 0's announcements: those that it has not used yet, oldest first."""

    def __init__(self, info: RankInfo) -> None:
        self._info = info
        self._last = 0
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._in_vain = ""
        """The tag that this rank has waited for last, and that rank 0 never began."""

    def join(self, tag: str) -> Step:
        """Wait until rank 0 has begun `tag`; returns the attempt and its announcement. Raises AttemptFailed: rank 0 did
        not begin this tag in time or could not, or the jobs differ in size.
        """
        info = self._info
        patience_s = info.timeout_s
        grace_s = min(1.0, patience_s / 4)
        noted = disputed = False
        ended: AttemptFailed | None = None
        while True:
            found, ended = yield from self._next_open(tag, ended)
            if found is not None:
                break
            patience = patience_s if noted and ended is None else grace_s
            if noted and (self._waiting or disputed):
                patience = min(patience, DISAGREE_S)
            head = yield Get("head", patience, str(self._last) if self._last else None)
            if head is not None:
                yield from self._read(int(head))
            elif ended is not None:
                # Not an older try whose successor is about to be announced: this very attempt failed before we came.
                raise ended
            elif noted and self._waiting and not disputed:
                # Rank 0 waits for us there, as we wait for it here: none of us would end before its timeout.
                refused = yield from self._refuse_waiting(f"it has opened tag {tag!r} instead")
                disputed, newest = bool(refused), ", ".join(map(repr, refused[-3:]))
            elif noted:
                self._in_vain = tag
                cause = f"rank 0 has not opened tag {tag!r} within {info.timeout_s:g} s"
                if disputed:
                    cause = f"rank 0 has opened tag {newest}, not {tag!r}"
                raise AttemptFailed(None, CommitOutcome(False, 0, cause, info.rank))
            else:
                noted = True
                patience_s -= grace_s
                in_vain = f", after it has waited in vain for tag {self._in_vain!r}" if self._in_vain else ""
                yield Put(f"note/{info.rank}", f"it waits for tag {tag!r}{in_vain}")
        if noted or self._in_vain:
            self._in_vain = ""
            yield Drop(f"note/{info.rank}")
        attempt, announcement = found
        if announcement["error"]:
            raise AttemptFailed(attempt, CommitOutcome(False, 0, announcement["error"], 0))
        if (announcement["world_size"], announcement["num_nodes"]) != (info.world_size, info.num_nodes):
            theirs = f"{announcement['world_size']} on {announcement['num_nodes']}"
            cause = f"it counts {info.world_size} ranks on {info.num_nodes} nodes, rank 0 counts {theirs}"
            raise AttemptFailed(attempt, (yield from rank_protocol.fail(info, attempt, cause)))
        return attempt, announcement

    def _refuse_waiting(self, cause: str) -> Step:
        """Give up, for all ranks, what rank 0 has announced and this rank has not begun; returns the tags of what had
        not ended by itself.
        """
        waiting, self._waiting = self._waiting, []
        refused = []
        for attempt, announcement in waiting:
            if (yield Get(f"{attempt}/result")) is None and (yield Get(f"{attempt}/open")) is not None:
                yield from rank_protocol.fail(self._info, attempt, cause)
                refused.append(announcement["tag"])
            yield from rank_protocol.settle(self._info, attempt)
        return refused

    def _next_open(self, tag: str, ended: AttemptFailed | None) -> Step:
        """The oldest announced attempt of `tag` that has not ended, or None; and the newest one that has failed,
        `ended` being the newest until now. This rank has no part in those that another one has followed.
        """
        for found in [one for one in self._waiting if one[1]["tag"] == tag]:
            self._waiting.remove(found)
            attempt, announcement = found
            raw = None if announcement["error"] else (yield Get(f"{attempt}/result"))
            if ended is not None and ended.attempt is not None:
                yield from rank_protocol.settle(self._info, ended.attempt)
            if raw is None:
                return found, None
            outcome = CommitOutcome.decode(raw)
            ended = None if outcome.ok else AttemptFailed(attempt, outcome)
        return None, ended

    def _read(self, head: int) -> Step:
        # A rank that starts late has no part in what was begun long before.
        self._last = self._last or max(0, head - _MAX_KEPT)
        while self._last < head:
            self._last += 1
            raw = yield Get(f"{self._last}/open")
            if raw is not None:
                self._waiting = [*self._waiting, (self._last, json.loads(raw))][-_MAX_KEPT:]


class Joining:
    """One coordinator's beginnings. Training thread; nothing here blocks."""

    def __init__(self, link: StoreLink, filesystem: FileSystem) -> None:
        self._link = link
        self._info = link.info
        self._fs = filesystem
        self._known = Announcements(link.info)
        self._joins: dict[str, Future[Any]] = {}

    def begin(self, opened: RankStaging) -> None:
        """Announce the checkpoint (rank 0) or join it (others): `opened` learns its attempt and its location."""
        if self._info.rank == 0:
            name = os.path.basename(opened.path)
            opened.attempt = self._link.submit(rank_protocol.announce(self._info, opened.tag, name))
        else:
            opened.attempt = self._in_turn(opened.tag, self._join(opened))
        if opened.identity is None:
            opened.attempt.add_done_callback(lambda attempt: self._location_failed(opened, attempt))

    def tell_begin_failed(self, tag: str, error: BaseException) -> None:
        """This rank cannot take part in the next checkpoint of that name."""
        if self._info.rank == 0:
            self._link.later(self._announce_failure(tag, error))
        else:
            self.tell_once_joined(self._in_turn(tag, self._join_to_fail(tag)), error)

    def tell_once_joined(self, attempt: Future[int], error: BaseException) -> None:
        """This rank gave up before rank 0 had begun: the others are told as soon as there is somebody to tell."""

        def tell() -> Step:
            failed = attempt.exception()
            if failed is None:
                yield from rank_protocol.fail(self._info, attempt.result(), cause_of(error))
                if self._info.leads:
                    yield from rank_protocol.open_node(self._info, attempt.result(), None)
                yield from rank_protocol.settle(self._info, attempt.result())
            elif isinstance(failed, AttemptFailed) and failed.attempt is not None:
                yield from rank_protocol.settle(self._info, failed.attempt)

        self._link.later(tell(), after=attempt)

    def _announce_failure(self, tag: str, error: BaseException) -> Step:
        attempt = yield from rank_protocol.announce(self._info, tag, None, cause_of(error))
        yield from rank_protocol.retire(self._info, attempt)

    def _join_to_fail(self, tag: str) -> Step:
        return (yield from self._known.join(tag))[0]

    def _in_turn(self, tag: str, step: Step) -> Future[Any]:
        """Given up or not, an earlier way into this tag gets the first of rank 0's attempts."""
        earlier = self._joins.get(tag)
        self._joins = {known: join for known, join in self._joins.items() if not join.done()}
        self._joins[tag] = self._link.submit(step, after=earlier)
        return self._joins[tag]

    def _join(self, opened: RankStaging) -> Step:
        """Another rank's way into an attempt; resolves the location."""
        info = self._info
        attempt, announcement = yield from self._known.join(opened.tag)
        if opened.identity is not None:
            yield from rank_protocol.open_node(info, attempt, os.path.basename(opened.path))
            return attempt
        name = announcement["name"]
        if announcement["node"] != info.node:
            name = yield from rank_protocol.await_node(info, attempt)
        try:
            path = transaction.join(self._fs, opened.root, opened.tag, name)
        except (CheckpointError, OSError) as error:
            outcome = yield from rank_protocol.fail(info, attempt, cause_of(error))
            raise AttemptFailed(attempt, outcome) from error
        opened.location.set_result(path)
        return attempt

    def _location_failed(self, opened: RankStaging, attempt: Future[int]) -> None:
        error = attempt.exception()
        if error is not None:
            opened.location.set_exception(opened.ended_by(error, self._info.rank))
