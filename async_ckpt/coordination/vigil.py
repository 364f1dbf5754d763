"""A coordinator's side of `liveness`: starts the steps on its link, and says what is certain about rank 0's end."""

from __future__ import annotations

import logging
import os
import time
from concurrent.futures import Future

from ..errors import report
from ..filesystem import FileSystem
from ..host.process import Owner, OwnerState
from ..manifest import parse_private_name
from ..transaction.trees import NO_LOCKS
from .liveness import Signs, beat, leave, watch
from .rank_requests import Seat
from .store_link import StoreLink

# A killed process lets go of its connections a moment before it has ended.
_DYING_S = 2.0


class Vigil:
    """Gives this rank's signs of life and looks after the others, in a job of several ranks."""

    def __init__(self, link: StoreLink, filesystem: FileSystem, seat: Seat, silence_s: float) -> None:
        self._filesystem = filesystem
        self._link = link
        self.staging_of_first = ""
        """The last staging directory that rank 0 has made, where this rank has joined it: its name tells who rank 0 is, also
        before its first sign of life was seen."""
        self._signs = Signs(seat, str(filesystem.owner()), lambda owner: is_gone(filesystem, owner), silence_s)
        if seat.world_size > 1:
            link.submit(beat(self._signs))

    def first_lost(self) -> str | None:
        """Why rank 0 will not answer, where it is lost."""
        return self._signs.first_lost()

    def begin(self, token: int, attempt: Future[int]) -> None:
        """A checkpoint is in flight on this rank; until `end`, the others are looked after."""
        signs = self._signs
        if signs.seat.world_size == 1:
            return
        signs.attempts[token] = None

        def begun(attempt: Future[int]) -> None:
            if attempt.exception() is None and token in signs.attempts:
                signs.attempts[token] = attempt.result()

        attempt.add_done_callback(begun)
        if not signs.watching:
            signs.watching = True
            self._link.submit(watch(signs))

    def end(self, token: int) -> None:
        """The checkpoint has ended on this rank."""
        self._signs.attempts.pop(token, None)

    def leave(self) -> Future[None]:
        """Say that this rank takes part in nothing any more."""
        self._signs.closed = True
        return self._link.submit(leave(self._signs))

    def first_has_ended(self) -> bool:
        """Whether rank 0's process has certainly ended. Blocks a moment, in case it is just ending."""
        owner = self._signs.owners.get(0)
        name = None if owner is not None else parse_private_name(os.path.basename(self.staging_of_first))
        if name is not None:
            owner = str(name.owner)
        deadline = time.monotonic() + _DYING_S
        while owner is not None and self._signs.seat.rank != 0:
            if is_gone(self._filesystem, owner):
                return True
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return False

    def will_never_be_renamed(self, location: str, identity: tuple[int, int]) -> bool:
        """Whether the staging directory that was joined is still there, and who could rename it has certainly ended. Blocks a moment."""
        name = parse_private_name(os.path.basename(location))
        deadline = time.monotonic() + _DYING_S
        while name is not None and time.monotonic() < deadline:
            if self._filesystem.owner_state(name.owner) is OwnerState.DEAD and self._is_unlocked(location):
                # A replacement exchanges the two directories: then this is the older checkpoint.
                return self._filesystem.stat(location).identity == identity
            time.sleep(0.05)
        return False

    def _is_unlocked(self, location: str) -> bool:
        """Whether the last thread of its owner has ended too; False where file systems have no locks: that cannot be known."""
        try:
            lock = self._filesystem.lock_dir(location)
        except FileNotFoundError:
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                report(logging.WARNING, "whether %r is still held cannot be seen: %s", location, error)
            return False
        if lock is not None:
            lock.close()
        return lock is not None


def is_gone(filesystem: FileSystem, owner: str) -> bool:
    """Whether the process of that owner has ended, for all that can be seen from here; False where it cannot be seen."""
    parsed = Owner.parse(owner)
    return parsed is not None and filesystem.owner_state(parsed) is OwnerState.DEAD
