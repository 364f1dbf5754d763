"""Which payloads of a planned state nobody is known to have touched since an earlier one: they come from the same
storages, and no version counter of a tensor over these has moved.

Counters do not move for fused optimizers and writes through ``.data``: that nothing was touched is a first test, and no
proof. A storage that no tensor of the state is over, or whose tensors keep no counter, counts as touched.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import deque
from operator import eq
from typing import Any

import torch

from ..plan.plan import PlannedState
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
        # As long as weak references exist, no other storage gets these numbers.
        is_known = before is not None and before._payloads == self._payloads
        self._taken: _Taken = before._taken if before is not None and is_known else _Taken(state)

    def untouched(self, earlier: SeenState, extent_bytes: int) -> list[bool]:
        """By extent: whether all payloads in it are untouched since `earlier`, which must be of the same layout."""
        num_extents = -(-self._file_bytes // extent_bytes)
        if not all(map(eq, self._starts, earlier._starts)) or self._strided != earlier._strided:
            return [False] * num_extents
        counted, were = self._counted(), earlier._counted()
        touched = {storage for storage, _ in counted ^ were} | {storage for storage, v in counted if v is None}
        known = {storage for storage, _ in counted} - touched
        untouched = [True] * num_extents
        columns = self._payloads, earlier._payloads, self._offsets, self._nbytes
        for now, then, offset, nbytes in zip(*columns, strict=True):
            if now != then or now not in known:
                first, last = offset // extent_bytes, (offset + nbytes - 1) // extent_bytes
                untouched[first : last + 1] = [False] * (last + 1 - first)
        return untouched

    def _counted(self) -> set[tuple[int, int | None]]:
        return set(zip(self._tensors, self._versions, strict=True))


class _Taken:
    """Weak references to the storages of a state, while this is alive."""

    def __init__(self, state: PlannedState) -> None:
        # A weak reference to a storage is its `_cdata`.
        taken: list[Any] = list(map(torch.UntypedStorage._weak_ref, state.storages))
        weakref.finalize(self, _let_go, taken).atexit = False


def _let_go(taken: list[int]) -> None:
    deque(map(torch.UntypedStorage._free_weak_ref, taken), maxlen=0)


def _storages_of(state: PlannedState) -> list[int]:
    """Of each tensor that is over just one; 0 for the others."""
    found = []
    for tensor in state.tensors:
        ids: list[int] = []
        with contextlib.suppress(RuntimeError, NotImplementedError):
            ids = storage_ids(tensor)
        found.append(ids[0] if len(ids) == 1 else 0)
    return found
