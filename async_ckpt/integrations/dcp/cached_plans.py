"""Plans of sharded saves that are used again: who compares what, and how the ranks learn that it is no longer right.

DCP has planned a structure once, with all ranks. From then on each rank makes its own local plan, compares it with the
one of that time, and says in its vote which global plan it has written by; nobody is asked. Rank 0 publishes only where
all of them say the same. `.metadata` holds where each object lies, so objects get room to grow in.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult

from ...engine.pending import PendingCommit
from ...errors import BackpressureTimeout, CommitError, RankFailedError, some_of
from ...plan.plan import PlannedState
from ...ranks.rank_coordinator import RankCoordinator
from ...ranks.rank_requests import Add, AwaitCount, Drop, Get, RankInfo, Step, one
from ...storage.staged import Destination
from .blobs import BlobPlanner, Extent, file_name, plan_file
from .metadata import encode_metadata, write_results

_MAX_SPARE_BYTES = 64 << 10
_ROOM_STEP_BYTES = 512
_AGAINST = "!"
_MAX_WHY = 200
# Templates are plain data, the same for every engine; only the training thread plans.
_blobs = BlobPlanner()


class KnownPlan(StorageWriter):
    """What one rank knows of a structure: planned by DCP's calls, with all ranks, and used `again` without them. Both
    give a `state` for the engine to save as `path`, and rank 0's `.metadata`. `meta`: what DCP's planner is told of the
    place, and `.metadata` says; nothing, where the plan is used again.
    """

    def __init__(self, *, caches: bool = True, meta: StorageMeta | None = None) -> None:
        super().__init__()
        self.name = ""
        """The name of the global plan, the same on all ranks."""
        self.path = ""
        self.state: PlannedState | None = None
        """This rank's part; None where it has none. To be taken away: it keeps the tensors alive."""
        self.metadata = b""
        """The content of `.metadata`, on DCP's coordinator rank."""
        self.last: PendingCommit | None = None
        """The last commit by this plan."""
        self._begin: Callable[[], object] | None = None
        self._save: Callable[[], object] | None = None
        self._meta = meta or StorageMeta()
        self._caches = caches
        self._is_first = True
        self._local = self._final = SavePlan([])
        self._extents: Sequence[Extent] = ()

    @contextlib.contextmanager
    def saving(self, begin: Callable[[], object], save: Callable[[], object]) -> Iterator[None]:
        """Have DCP's calls open a checkpoint, before they plan, and save in it what is planned: they tell all ranks of
        what is raised in them, so that none waits for one that failed."""
        self._begin, self._save = begin, save
        try:
            yield
        finally:
            # A plan that is kept must not keep its engine.
            self._begin = self._save = None

    # DCP's calls.

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def reset(self, checkpoint_id: Any = None) -> None:
        return None

    def storage_meta(self) -> StorageMeta:
        return self._meta

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._is_first = is_coordinator
        if self._begin is not None:
            self._begin()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        self._local = plan
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        name = uuid.uuid4().hex
        return [replace(plan, storage_data=(name, file_name(rank))) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        state, items = plan_file(plan, planner, _blobs, _room_for if self._caches else None)
        self.state = state if items else None
        (self.name, self.path), self._final = plan.storage_data, plan
        self._extents = [extent for _, extent in items]
        if self._save is not None:
            self._save()
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(write_results(items, self.path, None))
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self.metadata = encode_metadata(metadata, results, self._meta)
        if self._save is not None:
            self._save()

    # Later saves.

    def again(self, state_dict: dict[str, Any]) -> str:
        """Plan this rank's part anew, for the same place in the file; or why it cannot be written so. Talks to nobody;
        raises what DCP's planner does.
        """
        planner = DefaultSavePlanner()
        given = {key: value.state_dict() if isinstance(value, Stateful) else value for key, value in state_dict.items()}
        planner.set_up_planner(given, StorageMeta(), self._is_first)
        local = planner.create_local_plan()
        for item in (*local.items, *self._local.items):
            if item.tensor_data is not None:
                # Nobody reads it: to freeze or to thaw a layer changes no plan.
                item.tensor_data.properties.requires_grad = False
        if local != self._local:
            now, then = ({item.index: item for item in plan.items} for plan in (local, self._local))
            changed = sorted({index.fqn for index in now.keys() | then.keys() if now.get(index) != then.get(index)})
            return f"its state has another structure than before ({some_of(changed, show=repr)})"[:_MAX_WHY]
        room = [extent.length for extent in self._extents]
        state, items = plan_file(self._final, planner, _blobs, lambda k, num_bytes: max(num_bytes, room[k]))
        for (item, extent), before in zip(items, self._extents, strict=True):
            if extent != before:
                return f"{item.index.fqn[:_MAX_WHY]!r} has outgrown its place in the file"
        self.state = state if items else None
        return ""


class KnownPlans:
    """The plans of one engine, by structure. Training thread."""

    def __init__(self) -> None:
        self._by_key: dict[Any, KnownPlan] = {}
        self._num_calls = 0

    def take(self, key: Any, coordinator: Any, timeout_s: float) -> KnownPlan | None:
        """The plan for `key`, which is forgotten until it is kept again; None where all ranks are to plan anew. Waits
        for the last commit by it: none that failed holds any more, and that is so on all ranks, which have agreed. A
        rank that lacks a plan which others have gets one that nothing fits: the ranks learn of it by its vote. Raises
        BackpressureTimeout: that commit did not end in time. RankFailedError: a rank did not come in time.
        """
        self._num_calls += 1
        known = self._by_key.pop(key, None)
        if known is not None and known.last is not None:
            if not known.last.wait(timeout_s):
                told = f"the commit of {known.last.tag!r}, whose plan is to be used again, did not end within"
                raise BackpressureTimeout(f"{told} {timeout_s:g} s")
            known = known if known.last.failure() is None else None
        if not isinstance(coordinator, RankCoordinator):
            return known
        return None if self._all_lack_one(coordinator, has_one=known is not None) else known or KnownPlan()

    def keep(self, key: Any, known: KnownPlan, pending: PendingCommit) -> None:
        """Have the next save of this structure use `known`, by which `pending` was written."""
        known.last = pending
        self._by_key[key] = known

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
    """A checkpoint that is written by a known plan; `against` will hold why that does not hold any more."""

    known: str
    against: list[str] = field(default_factory=list)

    @property
    def vote(self) -> str:
        return _AGAINST + self.against[0] if self.against else self.known

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


def _room_for(k: int, num_bytes: int) -> int:
    """How many bytes an object gets in its file at first: its pickle may grow from save to save."""
    return -(-(num_bytes + min(num_bytes, _MAX_SPARE_BYTES)) // _ROOM_STEP_BYTES) * _ROOM_STEP_BYTES
