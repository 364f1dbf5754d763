"""What the ranks' protocol is made of: requests to a store, this rank's info, outcomes. Plain data."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from ..errors import CommitError, RankFailedError


class Put(NamedTuple):
    """Set a key."""

    key: str
    value: str


class Add(NamedTuple):
    """Add to a counter; the answer is its new value."""

    key: str
    amount: int = 1


class Claim(NamedTuple):
    """Set a key unless it is set; the answer is its value now."""

    key: str
    value: str


class Get(NamedTuple):
    """The value of a key, once it is set and differs from `other_than`; None where it is not after `timeout_s`."""

    key: str
    timeout_s: float = 0.0
    other_than: str | None = None


class GetMany(NamedTuple):
    """The values of keys that are all known to be set, in one request."""

    keys: tuple[str, ...]


class Drop(NamedTuple):
    """Delete a key."""

    key: str


class AwaitCount(NamedTuple):
    """True once a counter is `at_least`; False after `timeout_s` seconds, or when the link ends where that is said."""

    key: str
    at_least: int
    timeout_s: float
    ends_with_link: bool = False


Request = Put | Add | Claim | Get | GetMany | Drop | AwaitCount
Step = Generator[Request, Any, Any]


def one(request: Request) -> Step:
    """The step of a single request."""
    return (yield request)


@dataclass(frozen=True)
class RankInfo:
    """This rank's place in the job. `ranks` are those that share its staging directory; the lowest of them leads."""

    rank: int
    world_size: int
    timeout_s: float
    node: int = 0
    num_nodes: int = 1
    ranks: tuple[int, ...] = ()

    @property
    def leads(self) -> bool:
        """Whether this rank makes and renames a staging directory."""
        return self.rank == self.group[0]

    @property
    def group(self) -> tuple[int, ...]:
        """The ranks of this staging directory, ascending."""
        return self.ranks or tuple(range(self.world_size))

    @property
    def marks(self) -> dict[str, str]:
        """What the manifest of a node's own root says of it."""
        if self.num_nodes == 1:
            return {}
        return {"shared": "False", "node": str(self.node), "num_nodes": str(self.num_nodes)}


@dataclass(frozen=True)
class CommitOutcome:
    """How an attempt ended, as every rank reads it. `rank` is the one to blame, `by` the one that says so."""

    ok: bool
    rank: int | None
    cause: str
    by: int
    committed: bool | None = False
    created_unix_ns: int = 0
    ended_unix_s: float = field(default_factory=time.time, compare=False)
    """When it ended, by the clock of the rank that said so first: the same on all."""

    def error(self, root: str, tag: str) -> CommitError:
        """What a rank raises for an outcome that is no success."""
        who = "the ranks have lost each other" if self.rank is None else f"rank {self.rank} failed"
        if self.committed is None:
            state = f"whether checkpoint {tag!r} is visible is unknown: list {root!r}"
            return CommitError(f"{who}: {self.cause}; {state}", step="ranks", committed=None)
        state = f"checkpoint {tag!r} is not visible on any rank, older ones are untouched"
        return RankFailedError(f"{who}: {self.cause}; {state}", rank=self.rank)

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> CommitOutcome:
        return cls(**json.loads(text))


class AttemptFailed(Exception):
    """The attempt is over for all ranks; `outcome` says why. `attempt` is None where this rank never took part."""

    def __init__(self, attempt: int | None, outcome: CommitOutcome) -> None:
        super().__init__(outcome.cause)
        self.attempt = attempt
        self.outcome = outcome


def cause_of(error: BaseException) -> str:
    """What the other ranks are told about an error."""
    return f"{type(error).__name__}: {error}"[:600]
