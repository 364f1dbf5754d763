"""Whether tensors changed: while their snapshot was taken (by their version counters, those of their owners, and
content probes), or since an earlier one (by the counters alone)."""

from __future__ import annotations

import contextlib
from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterable, Sequence
from itertools import chain, compress
from operator import and_, eq, ne

import torch

from ..errors import TornSnapshotError, some_of
from ..plan.plan import PlannedState, version_counters
from ..plan.strided import view_span
from ..threads.locks import Lock
from .owned_storages import TakenIds, storage_ids
from .probes import PROBE_BYTES, ProbeMap


class TornCheck:
    """The tensors of one planned state as they were in `save`. Any thread; keeps them alive until `drop`.

    Args:
        owners: other tensors, perhaps over the same storages: a change through one of them moves its counter alone.
        probes: where the content probes lie.
        addresses: of the payloads; 0 for those on devices, whose numbers are in `on_devices`: they have no probes.
    """

    def __init__(
        self,
        state: PlannedState,
        owners: Sequence[torch.Tensor],
        probes: ProbeMap,
        addresses: list[int],
        on_devices: frozenset[int],
    ) -> None:
        self._tensors: Sequence[torch.Tensor] = state.tensors
        self._versions = state.versions
        self._owners = owners
        self._owner_versions = version_counters(owners)
        self._paths = state.tensor_paths
        self._storage_ids, self._starts = state.storage_ids, state.starts
        self._probes = probes
        self._on_devices = on_devices
        self._noted = probes.note(addresses)
        self._changed_bytes: list[tuple[int, int]] = []
        """Where a chunk held something else: payload and offset in it."""
        self._lock = Lock()

    def copies(self) -> list[tuple[int, int]]:
        """The payloads that were copied by being noted, and the address of each copy; valid while this is alive."""
        first, tiny = self._noted.data_ptr(), self._probes.tiny
        return [(payload, first + row * PROBE_BYTES) for payload, row in tiny if payload not in self._on_devices]

    def compare_chunk(self, k: int, chunk: torch.Tensor) -> None:
        """Compare the content of chunk `k`, which has been filled, with what was noted."""
        changed = self._probes.changed(self._noted, k, chunk)
        self._changed_bytes += [place for place in changed if place[0] not in self._on_devices]

    def check_torn(self, all_but: frozenset[int] = frozenset()) -> None:
        """Compare everything, at the end of the copies. Raises TornSnapshotError: something has changed; names up to
        ten tensors.

        Args:
            all_but: storages whose tensors are not copied yet and are left for a later check; others' are final.
        """
        with self._lock:
            has_changed = version_counters(self._tensors) != self._versions
            changed = _still_torn(self._tensors, self._versions) if has_changed else []
            torn = [i for i, version in enumerate(changed) if version is not None]
            if all_but:
                later = [not all_but.isdisjoint(storage_ids(t)) for t in self._tensors]
                torn = [i for i in torn if not later[i]]
                self._versions = [v if is_later else None for v, is_later in zip(self._versions, later, strict=True)]
            else:
                has_changed = version_counters(self._owners) != self._owner_versions
                over_owned = self._with_changed_owners() if has_changed else ()
                over_bytes = self._with_changed_bytes() if self._changed_bytes else ()
                torn = sorted({*torn, *over_owned, *over_bytes})
            paths = self._paths() if torn else []
        if not torn:
            return
        names = tuple(paths[i] for i in torn)
        shown = some_of(names, 10)
        raise TornSnapshotError(
            f"{len(names)} tensor(s) changed while their snapshot was being taken: {shown}. This checkpoint is not "
            "committed; older ones are untouched. Call wait_snapshot() before changing tensors, or guard the "
            "optimizer that changes them",
            names,
        )

    def accept_changes(self) -> None:
        """From now on counters may move: it is no sign of a torn snapshot. What has changed already still is."""
        with self._lock:
            self._versions = _still_torn(self._tensors, self._versions)
            self._owner_versions = _still_torn(self._owners, self._owner_versions)

    def drop(self) -> None:
        """Let go of the tensors: no change of theirs matters any more."""
        with self._lock:
            self._tensors = self._owners = ()
            self._versions, self._owner_versions, self._storage_ids, self._starts = [], [], [], []
            self._paths = list

    def _with_changed_owners(self) -> list[int]:
        """The tensors over storages that were changed through another tensor."""
        torn = zip(self._owners, _still_torn(self._owners, self._owner_versions), strict=True)
        ids = frozenset(chain.from_iterable(storage_ids(owner) for owner, version in torn if version is not None))
        return [i for i, tensor in enumerate(self._tensors) if not ids.isdisjoint(storage_ids(tensor))]

    def _with_changed_bytes(self) -> list[int]:
        """The tensors over bytes that probes have found changed."""
        ids, starts = self._storage_ids, self._starts
        places: dict[int, list[int]] = {}
        for payload, offset in self._changed_bytes:
            places.setdefault(ids[payload], []).append(starts[payload] + offset)
        over = [i for i, tensor in enumerate(self._tensors) if not places.keys().isdisjoint(storage_ids(tensor))]
        return [i for i in over if _covers(self._tensors[i], places)] or over


def _still_torn(tensors: Sequence[torch.Tensor], versions: Sequence[int | None]) -> list[int | None]:
    """The versions that are not those of the tensors any more; None for the others, and for those that are not
    compared."""
    return [v if v is not None and t._version != v else None for t, v in zip(tensors, versions, strict=True)]


def _covers(tensor: torch.Tensor, places: dict[int, list[int]]) -> bool:
    """Whether one of the bytes at `places` (by storage) lies between the first and the last one of a dense tensor."""
    local = getattr(tensor, "_local_tensor", tensor)
    if not local.numel():
        return False
    item: int = local.element_size()
    _, reach = view_span(local.size(), local.stride(), 0)
    start = local.storage_offset() * item
    end = start + reach * item
    return any(place < end and place + PROBE_BYTES > start for place in places.get(local.untyped_storage()._cdata, ()))


class SeenState:
    """The storages and version counters of one planned state, in numbers. Keeps no tensor alive.

    Counters do not move for fused optimizers and writes through ``.data``: that nothing was touched is a first test,
    and no proof. A storage that no tensor of the state is over, or whose tensors keep no counter, counts as touched.
    `before`: of an earlier state, perhaps over the same storages.
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
        come from storages `among` these)."""
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
