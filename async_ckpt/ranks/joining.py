"""How a rank gets into an attempt, and how it tells the others where it cannot."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future

from ..errors import CheckpointError, report
from ..storage import transaction
from ..storage.filesystem import FileSystem
from . import protocol as rank_protocol
from .announcements import Announcements, join
from .rank_outcome import cause_of
from .rank_requests import AttemptFailed, Step
from .rank_talk import RankTag, RankTalk


class Joining:
    """One coordinator's beginnings. Training thread; nothing here blocks."""

    def __init__(self, talk: RankTalk, filesystem: FileSystem) -> None:
        self._talk = talk
        self._info = talk.info
        self._fs = filesystem
        self._known = Announcements()
        self._joins: dict[str, Future[int]] = {}

    def begin(self, opened: RankTag) -> None:
        """Announce the checkpoint (rank 0) or join it (others): `opened` learns its attempt and its location."""
        if self._info.rank == 0:
            assert opened.staging is not None
            name = os.path.basename(opened.staging.path)
            opened.attempt = self._talk.submit(rank_protocol.announce(self._info, opened.tag, name))
        else:
            opened.attempt = self._joins[opened.tag] = self._join_after(self._joins.get(opened.tag), opened)
        if opened.staging is not None:
            opened.location.set_result(opened.staging.path)
        else:
            opened.attempt.add_done_callback(lambda attempt: self._location_failed(opened, attempt))

    def tell_begin_failed(self, tag: str, error: BaseException) -> None:
        def tell() -> Step:
            if self._info.rank == 0:
                attempt = yield from rank_protocol.announce(self._info, tag, None, cause_of(error))
                yield from self._talk.retire(attempt)
            else:
                attempt, _ = yield from join(self._info, tag, self._known)
                yield from rank_protocol.fail(self._info, attempt, cause_of(error))
                yield from rank_protocol.settle(self._info, attempt)

        self._talk.later(tell())

    def tell_once_joined(self, opened: RankTag, error: BaseException) -> None:
        """This rank gave up before rank 0 had begun: the others are told as soon as there is somebody to tell."""
        told: Future[None] = Future()

        def joined(attempt: Future[int]) -> None:
            if attempt.exception() is None:
                self._talk.later(rank_protocol.fail(self._info, attempt.result(), cause_of(error)))
                self._talk.later(rank_protocol.settle(self._info, attempt.result()))
            told.set_result(None)

        self._talk.track(told)
        opened.attempt.add_done_callback(joined)

    def _join_after(self, earlier: Future[int] | None, opened: RankTag) -> Future[int]:
        """Join once the earlier join of the same tag has ended: given up or not, the first of rank 0's attempts
        is its.
        """
        self._joins = {tag: join for tag, join in self._joins.items() if not join.done()}
        if earlier is None or earlier.done():
            return self._talk.submit(self._join(opened))
        attempt: Future[int] = Future()

        def passed_on(join: Future[int]) -> None:
            error = join.exception()
            if error is not None:
                attempt.set_exception(error)
            else:
                attempt.set_result(join.result())

        def join(_: Future[int]) -> None:
            try:
                self._talk.submit(self._join(opened)).add_done_callback(passed_on)
            except Exception as error:  # noqa: BLE001 -- whoever waits for the attempt must learn it
                attempt.set_exception(error)

        self._talk.track(attempt)
        earlier.add_done_callback(join)
        return attempt

    def _join(self, opened: RankTag) -> Step:
        """Another rank's way into an attempt; resolves the location."""
        info = self._info
        attempt, announcement = yield from join(info, opened.tag, self._known)
        if opened.staging is not None:
            yield from rank_protocol.open_node(info, attempt, os.path.basename(opened.staging.path))
            return attempt
        name = announcement["name"]
        if announcement["node"] != info.node:
            name = yield from rank_protocol.await_node(info, attempt)
        try:
            joined = transaction.join(self._fs, opened.destination.root, opened.tag, name)
        except (CheckpointError, OSError) as error:
            outcome = yield from rank_protocol.fail(info, attempt, cause_of(error))
            raise AttemptFailed(attempt, outcome) from error
        opened.location.set_result(joined.path)
        return attempt

    def _location_failed(self, opened: RankTag, attempt: Future[int]) -> None:
        error = attempt.exception()
        if error is not None:
            opened.location.set_exception(self._talk.translated(opened, error, reported=False))


def chain(source: Future[None], target: Future[None]) -> None:
    """`target` ends when `source` has ended; a failure of that is reported."""

    def done(ended: Future[None]) -> None:
        target.set_result(None)
        error = ended.exception()
        if error is not None:
            report(logging.WARNING, "a staging directory could not be removed: %s", error)

    source.add_done_callback(done)
