"""How an attempt ended, as the errors that callers get; plain functions."""

from __future__ import annotations

from ..errors import CommitError, RankFailedError
from .rank_requests import Verdict


def error_of(tag: str, root: str, verdict: Verdict) -> CommitError:
    """What a rank raises for a verdict that is no success."""
    who = "the ranks have lost each other" if verdict.rank is None else f"rank {verdict.rank} failed"
    if verdict.committed is None:
        state = f"whether checkpoint {tag!r} is visible is unknown: list {root!r}"
        return CommitError(f"{who}: {verdict.cause}; {state}", step="ranks", committed=None)
    state = f"checkpoint {tag!r} is not visible on any rank, older ones are untouched"
    return RankFailedError(f"{who}: {verdict.cause}; {state}", rank=verdict.rank)


def cause_of(error: BaseException) -> str:
    """What the other ranks are told about an error."""
    return f"{type(error).__name__}: {error}"[:600]
