"""How the bytes of a planned state get into staging chunks: by the fastest way each piece allows.

Pieces on the CPU are copied by address, in C-level loops, so that a tensor costs microseconds; pieces on devices are queued on a side
stream. Both release the GIL while they copy, but for small pieces: getting the GIL back takes longer than copying them.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, compress, repeat
from operator import add, le

import torch

from ..errors import TornSnapshotError
from ..host.device import accelerators, keep_for, on_stream, record_now, side_stream
from ..host.memory import move_holding_gil, move_releasing_gil
from ..plan.plan import PlannedState, version_counters
from ..threads.locks import Lock, uninterrupted
from .arena import StagingChunk
from .chunk_map import Cuts, LargePiece, literal_sources

OnCopied = Callable[[str, float, int, int], None]
"""Called with (kind "copy" or "d2h", start on ``time.perf_counter``, file offset, bytes) when a chunk's copy has ended."""

# How many small pieces one C-level loop copies before a signal is looked at: well under 1 ms, with the GIL held.
_BATCH = 100


class Fill:
    """The sources of one file and how to copy their parts into chunks."""

    def __init__(self, state: PlannedState, cuts: Cuts, streams: dict[torch.device, torch.Stream], on_copied: OnCopied | None) -> None:
        self.cuts = cuts
        self._on_copied = on_copied
        self._streams = streams
        self.storages = state.sources.storage
        self._tensors: Sequence[torch.Tensor] = state.tensors
        self._versions = state.versions
        self._payload_nbytes = state.plan.payload_nbytes
        self._paths = state.tensor_paths
        self._literals = literal_sources(state.plan, cuts)
        self._starts = state.sources.offset_bytes
        self._planned_addresses = state.sources.addresses
        self.devices = accelerators(state.sources.all_devices())
        self._addresses: list[int] = []
        self._small_addresses: list[int] = []
        self._lock = Lock()

    def _find_addresses(self, *, again: bool) -> list[int]:
        """Where each payload's bytes lie; 0 on a device. CPU bytes are copied by address: no torch call per tensor."""
        if self._planned_addresses and not again and not self.devices:
            return list(map(add, self._planned_addresses, self._starts))
        storage_nbytes = list(map(torch.UntypedStorage.nbytes, self.storages))
        if not all(map(le, map(add, self._starts, self._payload_nbytes), storage_nbytes)):
            raise self._resized(storage_nbytes)
        addresses = list(map(add, map(torch.UntypedStorage.data_ptr, self.storages), self._starts))
        if not self.devices:
            return addresses
        return [address if storage.device.type == "cpu" else 0 for address, storage in zip(addresses, self.storages, strict=True)]

    def _resized(self, storage_nbytes: list[int]) -> TornSnapshotError:
        ends = map(add, self._starts, self._payload_nbytes)
        end, now = next((end, now) for end, now in zip(ends, storage_nbytes, strict=True) if end > now)
        return TornSnapshotError(
            f"a tensor's storage was resized from {end} bytes or more to {now} before its snapshot was taken. This checkpoint is not "
            "committed; older ones are untouched. Call wait_snapshot() before freeing tensors"
        )

    def find_sources(self, *, again: bool = False) -> None:
        """Before the first `copy`: where the bytes lie, for all threads; `again` where the user may have moved them meanwhile."""
        if again or not self._addresses:
            payloads = self._find_addresses(again=again)
            self._small_addresses = self.cuts.small_addresses(payloads)
            self._addresses = [*payloads, *map(_address_of, self._literals)]

    def copy(
        self, k: int, chunk: StagingChunk, chosen: Sequence[bool] | None, *, literals: bool = True, is_urgent: bool = False
    ) -> list[torch.Event]:
        """Copy pieces of chunk `k`: of the chosen payloads (None: all), and with `literals` all that is no payload.

        Returns the events of queued device copies.

        Args:
            is_urgent: somebody waits for it: keep the GIL between small pieces too.
        """
        wanted = None
        if chosen is not None or not literals or self.devices:
            payloads = [True] * self.cuts.num_payloads if chosen is None else chosen
            wanted = [*payloads, *[literals] * len(self._literals)]
        large = self.cuts.large[k] if wanted is None else [piece for piece in self.cuts.large[k] if wanted[piece.source]]
        on_device: list[LargePiece] = []
        if wanted is not None and self.devices:
            on_device = [piece for piece in self._payload_pieces(k) if wanted[piece.source] and not self._addresses[piece.source]]
            large = [piece for piece in large if self._addresses[piece.source]]
            wanted = [bool(is_wanted and address) for is_wanted, address in zip(wanted, self._addresses, strict=True)]
        if literals:
            self._copy_between(k, chunk, is_urgent=is_urgent)
        self._copy_small(k, chunk, wanted, is_urgent=is_urgent)
        for piece in large:
            move_releasing_gil(chunk.address + piece.chunk_offset, self._addresses[piece.source] + piece.source_offset, piece.nbytes)
        return self._copy_from_devices(on_device, chunk) if on_device else []

    def _copy_small(self, k: int, chunk: StagingChunk, wanted: list[bool] | None, *, is_urgent: bool) -> None:
        rows = self.cuts.small.rows(k)
        columns = [self.cuts.small.chunk_offsets[rows], self._small_addresses[rows], self.cuts.small.nbytes[rows]]
        if wanted is not None:
            chosen = list(map(wanted.__getitem__, self.cuts.small.sources[rows]))
            columns = [list(compress(column, chosen)) for column in columns]
        _copy_rows(chunk.address, *columns, is_urgent=is_urgent)

    def _copy_between(self, k: int, chunk: StagingChunk, *, is_urgent: bool) -> None:
        """The literals between payloads: they depend on the layout alone, and may be there from the save before."""
        imprint = (self.cuts.key, k)
        if chunk.inherited != imprint:
            between = self.cuts.between
            rows = between.rows(k)
            addresses = list(map(add, between.source_offsets[rows], repeat(_address_of(self.cuts.middle))))
            _copy_rows(chunk.address, between.chunk_offsets[rows], addresses, between.nbytes[rows], is_urgent=is_urgent)
        chunk.imprint = imprint

    def _payload_pieces(self, k: int) -> Iterator[LargePiece]:
        """All of chunk `k`, one by one."""
        small = self.cuts.small
        rows = small.rows(k)
        columns = small.sources[rows], small.source_offsets[rows], small.chunk_offsets[rows], small.nbytes[rows]
        large = (piece for piece in self.cuts.large[k] if piece.source < self.cuts.num_payloads)
        return chain(large, map(LargePiece, *columns))

    def report(self, k: int, chosen: Sequence[bool] | None, began: float) -> None:
        """Tell the observers that the chosen parts of chunk `k` are copied."""
        if self._on_copied is None:
            return
        num_bytes = self.cuts.nbytes(k)
        if chosen is not None:
            num_bytes = sum(piece.nbytes for piece in self._payload_pieces(k) if chosen[piece.source])
        if num_bytes:
            self._on_copied("d2h" if self.devices else "copy", began, self.cuts.offset(k), num_bytes)

    def _bytes_of(self, payload: int, offset: int, nbytes: int) -> torch.Tensor:
        storage = self.storages[payload]
        view = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return view.set_(storage, self._starts[payload] + offset, (nbytes,), (1,))

    def _copy_from_devices(self, pieces: list[LargePiece], chunk: StagingChunk) -> list[torch.Event]:
        by_device: dict[torch.device, list[LargePiece]] = {}
        for piece in pieces:
            by_device.setdefault(self.storages[piece.source].device, []).append(piece)
        events = []
        for device, theirs in by_device.items():
            stream = self._stream(device)
            with on_stream(stream):
                for piece in theirs:
                    source = self._bytes_of(piece.source, piece.source_offset, piece.nbytes)
                    keep_for(source, stream)
                    chunk.tensor[piece.chunk_offset : piece.chunk_offset + piece.nbytes].copy_(source, non_blocking=True)
                events.append(record_now(device))
        return events

    def _stream(self, device: torch.device) -> torch.Stream:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = side_stream(device)
        return stream

    def record_callers(self) -> dict[torch.device, torch.Event]:
        """Mark, on the caller's streams, the point after which the sources are final."""
        return {device: record_now(device) for device in self.devices}

    def wait_callers(self, events: dict[torch.device, torch.Event]) -> None:
        """Order the side streams behind the callers' events; does not block the CPU."""
        for device, event in events.items():
            self._stream(device).wait_event(event)

    @staticmethod
    def wait_devices(events: list[torch.Event]) -> None:
        """Block this thread (not the GIL) until the queued copies ended."""
        for event in events:
            event.synchronize()

    def check_versions(self, all_but: frozenset[int] = frozenset()) -> None:
        """Compare the version counters with those at plan time.

        Args:
            all_but: storages whose tensors are not copied yet, and are left for a later check; the others are final then.

        Raises:
            TornSnapshotError: some moved; names up to ten.
        """
        with self._lock:
            torn = self._changed()
            paths = self._paths() if torn else []
            if all_but:
                later = [not all_but.isdisjoint(storage_ids(t)) for t in self._tensors]
                torn = [i for i in torn if not later[i]]
                self._versions = [v if is_later else None for v, is_later in zip(self._versions, later, strict=True)]
        if not torn:
            return
        names = tuple(paths[i] for i in torn)
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise TornSnapshotError(
            f"{len(names)} tensor(s) changed while their snapshot was being taken: {shown}. This checkpoint is not committed; "
            "older ones are untouched. Call wait_snapshot() before changing tensors, or guard the optimizer that changes them",
            names,
        )

    def _changed(self) -> list[int]:
        if version_counters(self._tensors) == self._versions:
            return []
        return [i for i, (t, v) in enumerate(zip(self._tensors, self._versions, strict=True)) if v is not None and t._version != v]

    @property
    def has_changed(self) -> bool:
        """Whether `check_versions` would raise now."""
        with self._lock:
            return bool(self._changed())

    def accept_changes(self) -> None:
        """From now on tensors may change: it is no sign of a torn snapshot. What has changed already still is."""
        with self._lock:
            changed = set(self._changed())
            self._versions = [v if i in changed else None for i, v in enumerate(self._versions)]

    def finish_device_copies(self) -> None:
        """Return when no queued copy writes to a chunk any more, whatever interrupts the wait: the chunks are to be given up."""
        for device in self.devices:
            if device in self._streams:
                with contextlib.suppress(RuntimeError):  # The device is lost, and its copies with it.
                    uninterrupted(self._streams[device].synchronize)

    def drop_sources(self) -> None:
        """Let go of the user's tensors: their bytes are in the arena, and no change of theirs matters any more."""
        with self._lock:
            self._tensors = ()
            self._versions = []
            self._paths = list
        self.storages = []


def _copy_rows(base: int, offsets: list[int], sources: list[int], nbytes: list[int], *, is_urgent: bool) -> None:
    """Copy `nbytes[i]` bytes from address `sources[i]` to `base + offsets[i]`."""
    for low in range(0, len(nbytes), _BATCH):
        batch = slice(low, low + _BATCH)
        deque(map(move_holding_gil, map(base.__add__, offsets[batch]), sources[batch], nbytes[batch]), maxlen=0)
        if not is_urgent:
            time.sleep(0)


def _address_of(data: bytes) -> int:
    """Of the first byte; valid while `data` is alive."""
    return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0


def storage_ids(tensor: torch.Tensor) -> list[int]:
    """`UntypedStorage._cdata` of the bytes of a dense tensor (of a DTensor's local part); empty for other layouts, and without bytes."""
    local = getattr(tensor, "_local_tensor", tensor)
    if torch.nn.parameter.is_lazy(local):
        return []
    return [local.untyped_storage()._cdata] if local.layout == torch.strided else []
