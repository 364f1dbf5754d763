"""How an attempt ended, as the errors that callers get; plain functions."""

from __future__ import annotations

from ..errors import CommitError, RankFailedError
from .coordinator import Destination
from .rank_requests import CommitOutcome


def error_of(destination: Destination, outcome: CommitOutcome) -> CommitError:
    """What a rank raises for an outcome that is no success."""
    tag, root = destination.tag, destination.root
    who = "the ranks have lost each other" if outcome.rank is None else f"rank {outcome.rank} failed"
    if outcome.committed is None:
        state = f"whether checkpoint {tag!r} is visible is unknown: list {root!r}"
        return CommitError(f"{who}: {outcome.cause}; {state}", step="ranks", committed=None)
    state = f"checkpoint {tag!r} is not visible on any rank, older ones are untouched"
    return RankFailedError(f"{who}: {outcome.cause}; {state}", rank=outcome.rank)


def cause_of(error: BaseException) -> str:
    """What the other ranks are told about an error."""
    return f"{type(error).__name__}: {error}"[:600]
