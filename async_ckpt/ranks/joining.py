"""How a rank gets into an attempt, and how it tells the others where it cannot."""

from __future__ import annotations

import os
from concurrent.futures import Future
from typing import Any

from ..errors import CheckpointError
from ..storage import transaction
from ..storage.filesystem import FileSystem
from . import protocol as rank_protocol
from .announcements import Announcements, join
from .rank_requests import AttemptFailed, Step, cause_of
from .rank_talk import RankStaging, RankTalk


class Joining:
    """One coordinator's beginnings. Training thread; nothing here blocks."""

    def __init__(self, talk: RankTalk, filesystem: FileSystem) -> None:
        self._talk = talk
        self._info = talk.info
        self._fs = filesystem
        self._known = Announcements()
        self._joins: dict[str, Future[Any]] = {}

    def begin(self, opened: RankStaging) -> None:
        """Announce the checkpoint (rank 0) or join it (others): `opened` learns its attempt and its location."""
        if self._info.rank == 0:
            name = os.path.basename(opened.path)
            opened.attempt = self._talk.submit(rank_protocol.announce(self._info, opened.tag, name))
        else:
            opened.attempt = self._in_turn(opened.tag, self._join(opened))
        if opened.identity is None:
            opened.attempt.add_done_callback(lambda attempt: self._location_failed(opened, attempt))

    def admit(self, opened: RankStaging, path: str, manifest_bytes: int) -> Future[str]:
        """See `Coordinator`."""
        folder: Future[str] = Future()

        def ask() -> Step:
            yield from rank_protocol.admit(self._info, opened.attempt.result(), path, manifest_bytes)

        def answered(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                folder.set_result(opened.path)
            else:
                folder.set_exception(self._talk.translated(opened, error, reported=False))

        self._talk.submit(ask(), after=opened.attempt).add_done_callback(answered)
        return folder

    def tell_begin_failed(self, tag: str, error: BaseException) -> None:
        """This rank cannot take part in the next checkpoint of that name."""

        if self._info.rank == 0:
            self._talk.later(self._announce_failure(tag, error))
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

        self._talk.track(self._talk.submit(tell(), after=attempt))

    def _announce_failure(self, tag: str, error: BaseException) -> Step:
        attempt = yield from rank_protocol.announce(self._info, tag, None, cause_of(error))
        yield from self._talk.retire(attempt)

    def _join_to_fail(self, tag: str) -> Step:
        attempt, _ = yield from join(self._info, tag, self._known)
        return attempt

    def _in_turn(self, tag: str, step: Step) -> Future[Any]:
        """Given up or not, an earlier way into this tag gets the first of rank 0's attempts."""
        earlier = self._joins.get(tag)
        self._joins = {known: join for known, join in self._joins.items() if not join.done()}
        self._joins[tag] = self._talk.submit(step, after=earlier)
        return self._joins[tag]

    def _join(self, opened: RankStaging) -> Step:
        """Another rank's way into an attempt; resolves the location."""
        info = self._info
        attempt, announcement = yield from join(info, opened.tag, self._known)
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
            opened.location.set_exception(self._talk.translated(opened, error, reported=False))
