"""How a coordinator talks with the other ranks: steps on its link, and their outcomes as errors."""

from __future__ import annotations

import concurrent.futures
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..errors import RankFailedError
from ..storage.staged import Staging
from ..threads.locks import Lock
from . import protocol as rank_protocol
from .rank_requests import AttemptFailed, CommitOutcome, RankInfo, Step
from .store_link import LinkLostError, StoreLink


@dataclass(eq=False)
class RankStaging(Staging):
    """A checkpoint that this rank stages with others."""

    attempt: Future[int] = field(default_factory=Future)
    outcome: CommitOutcome | None = None
    """How it ended, once this rank has learnt it."""


class RankTalk:
    """One coordinator's link. Any thread; `learn` and `ask` block, nothing else does."""

    def __init__(self, link: StoreLink, info: RankInfo) -> None:
        self._link = link
        self.info = info
        self._lock = Lock()
        self._background: list[Future[Any]] = []
        self._unretired: set[int] = set()

    def submit(self, step: Step, after: Future[Any] | None = None) -> Future[Any]:
        """Run a step, once the one that gives `after` has ended."""
        return self._link.submit(step, after)

    def later(self, step: Step) -> None:
        """Run a step whose end `close` waits for a while."""
        self.track(self.submit(step))

    def track(self, future: Future[Any]) -> None:
        """Let `close` wait for this too."""
        with self._lock:
            self._background = [known for known in self._background if not known.done()]
            self._background.append(future)

    def ask(self, step: Step) -> Any:
        """The result of a step that belongs to no checkpoint. Blocks.

        Raises:
            RankFailedError: the store is lost.
        """
        try:
            return self.submit(step).result()
        except LinkLostError as lost:
            raise RankFailedError(f"the ranks have lost each other: {lost}", rank=None) from lost

    def learn(self, opened: RankStaging, step: Step | Future[Any], *, reported: bool = False) -> Any:
        """The result of a step of `opened`; `reported` says that the others may publish without this rank. Blocks.

        Raises:
            RankFailedError, CommitError: the attempt is over; the outcome is kept in `opened`.
        """
        try:
            return (step if isinstance(step, Future) else self.submit(step)).result()
        except (AttemptFailed, LinkLostError) as failure:
            raise self.translated(opened, failure, reported) from failure

    def translated(self, opened: RankStaging, error: BaseException, reported: bool) -> BaseException:
        """A step's failure as what the caller of `commit` gets."""
        if isinstance(error, AttemptFailed):
            opened.outcome = outcome = error.outcome
        elif isinstance(error, LinkLostError):
            outcome = CommitOutcome(False, None, str(error), self.info.rank, None if reported else False)
        else:
            return error
        translated = outcome.error(opened.destination.root, opened.tag)
        translated.__cause__ = error
        return translated

    def retire(self, attempt: int) -> Step:
        """Rank 0: forget an attempt once all ranks have seen how it ended; `close` does it if need be."""
        with self._lock:
            self._unretired.add(attempt)
        yield from rank_protocol.retire(self.info, attempt)
        with self._lock:
            self._unretired.discard(attempt)

    def close(self, linger_s: float) -> None:
        """Let the others read the last outcome, for at most `linger_s`; then stop the link."""
        deadline = time.monotonic() + min(linger_s, self.info.timeout_s)
        while time.monotonic() < deadline:
            with self._lock:
                waiting = [future for future in self._background if not future.done()]
            if not waiting:
                break
            concurrent.futures.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        # A later engine over this store must not take these for its own.
        last = [self._link.submit(rank_protocol.retire(self.info, attempt, 0.0)) for attempt in tuple(self._unretired)]
        concurrent.futures.wait(last, timeout=linger_s)
        self._link.close(linger_s)
