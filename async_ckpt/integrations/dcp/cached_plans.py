"""Plans of sharded saves that are used again: who compares what, and how the ranks learn that it is no longer right.

DCP has planned a structure once, with all ranks. From then on each rank makes its own local plan, compares it with the
one of that time, and says in its vote which global plan it has written by; nobody is asked. Rank 0 publishes only where
all of them say the same. `.metadata` holds where each object lies, so objects get room to grow in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.stateful import Stateful

from ...engine.pending import PendingCommit
from ...errors import BackpressureTimeout, CommitError, RankFailedError, some_of
from ...ranks.rank_coordinator import RankCoordinator
from ...ranks.rank_requests import Add, AwaitCount, Drop, Get, RankInfo, Step, one
from ...storage.staged import Destination
from .blobs import BlobPlanner, Extent
from .writer import plan_file

_MAX_SPARE_BYTES = 64 << 10
_ROOM_STEP_BYTES = 512
_AGAINST = "!"
_MAX_WHY = 200


@dataclass
class KnownPlan:
    """What one rank knows of a structure that was planned once."""

    name: str = ""
    """The name of the global plan, the same on all ranks."""
    local: SavePlan = field(default_factory=lambda: SavePlan([]))
    final: SavePlan = field(default_factory=lambda: SavePlan([]))
    """The part of the global plan that this rank writes."""
    extents: Sequence[Extent] = ()
    """Where its items lie."""
    is_first: bool = True
    """Whether this is DCP's coordinator rank."""
    metadata: bytes = b""
    """The content of `.metadata`, on that rank."""
    last: PendingCommit | None = None
    """The last commit by this plan."""


class KnownPlans:
    """The plans of one engine, by structure. Training thread."""

    def __init__(self) -> None:
        self._by_key: dict[Any, KnownPlan] = {}
        self._num_calls = 0

    def take(self, key: Any, coordinator: Any, timeout_s: float) -> KnownPlan | None:
        """The plan for `key`, which is forgotten until it is kept again; None where all ranks are to plan anew. Waits
        for the last commit by it: none that failed holds any more, and that is so on all ranks, which have agreed.

        A rank that lacks a plan which others have gets one that nothing fits: the ranks learn of it by its vote.

        Raises:
            BackpressureTimeout: that commit did not end in time. RankFailedError: a rank did not come in time.
        """
        self._num_calls += 1
        known = self._by_key.pop(key, None)
        if known is not None and known.last is not None:
            if not known.last.wait(timeout_s):
                raise BackpressureTimeout(
                    f"the commit of {known.last.tag!r}, whose plan is to be used again, did not end within "
                    f"{timeout_s:g} s"
                )
            known = known if known.last.failure() is None else None
        if not isinstance(coordinator, RankCoordinator):
            return known
        return None if self._all_lack_one(coordinator, has_one=known is not None) else known or KnownPlan()

    def keep(self, key: Any, known: KnownPlan, pending: PendingCommit) -> PendingCommit:
        """Have the next save of this structure use `known`, by which `pending` was written; returns that."""
        known.last = pending
        self._by_key[key] = known
        return pending

    def _all_lack_one(self, coordinator: RankCoordinator, *, has_one: bool) -> bool:
        """Whether no rank has a plan; one that has says so, and waits for nobody."""
        info, key = coordinator.info, f"plan/{self._num_calls}"
        if info.rank == 0 and self._num_calls > 2:
            coordinator.talk.later(one(Drop(f"plan/{self._num_calls - 2}")))
        if has_one:
            coordinator.talk.later(one(Add(key, info.world_size + 1)))
            return False
        count = coordinator.talk.ask(count_lacking(info, key))
        if count < info.world_size:
            raise RankFailedError(
                f"{info.world_size - count} rank(s) did not come to this save within {info.timeout_s:g} s; nothing is "
                "visible of it",
                rank=None,
                step="plan",
            )
        return bool(count == info.world_size)


def count_lacking(info: RankInfo, key: str) -> Step:
    """How many ranks lack a plan; more than there are, where one has it."""
    yield Add(key)
    yield AwaitCount(key, info.world_size, info.timeout_s)
    return int((yield Get(key)) or 0)


@dataclass(frozen=True)
class PlannedDestination(Destination):
    """A checkpoint that is written by a known plan; `said` will be that one's name, or why it does not hold any
    more.
    """

    known: str
    said: list[str] = field(default_factory=list)

    @property
    def vote(self) -> str:
        return "".join(self.said)

    def check_votes(self, votes: Sequence[str]) -> None:
        bad = [
            f"rank {rank}: {vote[1:] if vote[:1] == _AGAINST else 'it goes by another plan than rank 0'}"
            for rank, vote in enumerate(votes)
            if vote != self.known
        ]
        if bad:
            raise CommitError(
                f"the plan of an earlier save does not hold any more ({some_of(bad)}); nothing is visible of "
                f"checkpoint {self.tag!r}, the next save of this state plans anew",
                step="plan",
            )


def room_for(k: int, num_bytes: int) -> int:
    """How many bytes an object gets in its file at first: its pickle may grow from save to save."""
    return -(-(num_bytes + min(num_bytes, _MAX_SPARE_BYTES)) // _ROOM_STEP_BYTES) * _ROOM_STEP_BYTES


def plan_again(
    known: KnownPlan, state_dict: dict[str, Any], blobs: BlobPlanner
) -> tuple[str, Any, list[tuple[Any, Extent]]]:
    """This rank's file by a known plan, with its items, as `plan_file`; and why it cannot be written so, or "".

    Talks to nobody. Raises what DCP's planner does.
    """
    planner = DefaultSavePlanner()
    state = {name: value.state_dict() if isinstance(value, Stateful) else value for name, value in state_dict.items()}
    planner.set_up_planner(state, StorageMeta(), known.is_first)
    local = planner.create_local_plan()
    for item in (*local.items, *known.local.items):
        if item.tensor_data is not None:
            # Nobody reads it: to freeze or to thaw a layer changes no plan.
            item.tensor_data.properties.requires_grad = False
    if local != known.local:
        now, then = ({item.index: item for item in plan.items} for plan in (local, known.local))
        changed = sorted({index.fqn for index in now.keys() | then.keys() if now.get(index) != then.get(index)})
        return (
            f"{_AGAINST}its state has another structure than before ({some_of(changed, show=repr)})"[:_MAX_WHY],
            None,
            [],
        )
    room = [extent.length for extent in known.extents]
    planned, items = plan_file(known.final, planner, blobs, lambda k, num_bytes: max(num_bytes, room[k]))
    for (item, extent), before in zip(items, known.extents, strict=True):
        if extent != before:
            return f"{_AGAINST}{item.index.fqn[:_MAX_WHY]!r} has outgrown its place in the file", None, []
    return "", planned, items
