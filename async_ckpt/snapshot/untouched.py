"""Which payloads of a planned state nobody is known to have touched since an earlier one: they come from the same
storages, and no version counter of a tensor over these has moved.

Counters do not move for fused optimizers and writes through ``.data``: that nothing was touched is a first test, and no
proof. A storage that no tensor of the state is over, or whose tensors keep no counter, counts as touched.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable
from itertools import compress
from operator import and_, eq, ne

from ..plan.plan import PlannedState
from .owned_storages import TakenIds
from .torn_check import storage_ids


class SeenState:
    """The storages and version counters of one planned state, in numbers. Keeps no tensor alive.

    Args:
        before: of an earlier state, perhaps over the same storages.
    """

    def __init__(self, state: PlannedState, before: SeenState | None) -> None:
        plan = state.plan
        self.plan_hash = plan.plan_hash
        # Not the plan itself, which holds everything in the file that is no payload.
        self._file_bytes, self._strided = plan.file_bytes, plan.strided
        self._offsets, self._nbytes = plan.payload_offsets, plan.payload_nbytes
        self._payloads = state.storage_ids
        self._starts = state.starts
        self._tensors = state.tensor_storages or _storages_of(state)
        self._versions = state.versions
        is_known = before is not None and before._payloads == self._payloads
        self._taken: TakenIds = before._taken if before is not None and is_known else TakenIds(state.storages)

    def untouched(self, earlier: SeenState, extent_bytes: int, among: Container[int] | None = None) -> list[bool]:
        """By extent: whether all payloads in it are untouched since `earlier`, which must be of the same layout (and
        come from storages `among` these).
        """
        starts = range(0, self._file_bytes, extent_bytes)
        if not all(map(eq, self._starts, earlier._starts)) or self._strided != earlier._strided:
            return [False] * len(starts)
        # In loops in C: for all that changes with every step, this is in vain.
        known = self._known(earlier)
        flags: Iterable[bool] = map(known.__contains__, self._payloads)
        if self._payloads != earlier._payloads:
            flags = map(and_, flags, map(eq, self._payloads, earlier._payloads))
        if among is not None:
            flags = map(and_, flags, map(among.__contains__, self._payloads))
        untouched, offsets = list(flags), self._offsets
        found = []
        for start in starts:
            first, behind = max(0, bisect_right(offsets, start) - 1), bisect_left(offsets, start + extent_bytes)
            first += first < behind and offsets[first] + self._nbytes[first] <= start
            found.append(all(untouched[first:behind]))
        return found

    def _known(self, earlier: SeenState) -> set[int]:
        """The storages of tensors whose counters are known, and are what they were."""
        if self._tensors == earlier._tensors:
            touched = set(compress(self._tensors, map(ne, self._versions, earlier._versions)))
        else:
            counted = (set(zip(seen._tensors, seen._versions, strict=True)) for seen in (self, earlier))
            touched = {storage for storage, _ in next(counted) ^ next(counted)}
        if None in self._versions:
            pairs = zip(self._tensors, self._versions, strict=True)
            touched.update(storage for storage, version in pairs if version is None)
        return set(self._tensors) - touched

    def storages_in(self, offset: int, end: int) -> set[int]:
        """Those that the bytes from `offset` to `end` of the file come from."""
        columns = self._payloads, self._offsets, self._nbytes
        return {found for found, at, nbytes in zip(*columns, strict=True) if at < end and at + nbytes > offset}


def _storages_of(state: PlannedState) -> list[int]:
    """Of each tensor that is over just one; 0 for the others."""
    found = []
    for tensor in state.tensors:
        ids: list[int] = []
        with contextlib.suppress(RuntimeError, NotImplementedError):
            ids = storage_ids(tensor)
        found.append(ids[0] if len(ids) == 1 else 0)
    return found
