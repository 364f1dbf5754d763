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
from itertools import accumulate, chain, compress, repeat
from operator import add, le

import torch

from ..errors import TornSnapshotError
from ..host.device import accelerators, keep_for, on_stream, record_now, side_stream
from ..host.memory import address_of, move_holding_gil, move_releasing_gil
from ..plan.plan import PlannedState, version_counters
from ..threads.locks import Lock, uninterrupted
from .arena import StagingChunk
from .chunk_map import Cuts, LargePiece, literal_sources
from .probes import PROBE_BYTES, Probes

OnCopied = Callable[[str, float, int, int], None]
"""Called with (kind "copy" or "d2h", start on ``time.perf_counter``, file offset, bytes) when a chunk's copy has ended."""

# How many small pieces one C-level loop copies before a signal is looked at: well under 1 ms, with the GIL held.
_BATCH = 100


class Fill:
    """The sources of one file and how to copy their parts into chunks.

    Args:
        owners: other tensors over the same storages, perhaps, and over others: their counters move too.
    """

    def __init__(
        self,
        state: PlannedState,
        cuts: Cuts,
        streams: dict[torch.device, torch.Stream],
        on_copied: OnCopied | None,
        owners: Sequence[torch.Tensor] = (),
    ) -> None:
        self.cuts = cuts
        self._on_copied = on_copied
        self._streams = streams
        self.storages = state.sources.storage
        self._tensors: Sequence[torch.Tensor] = state.tensors
        self._versions = state.versions
        self._owners = owners
        self._owner_versions = version_counters(owners)
        self._probes: Probes | None = None
        self._payload_nbytes = state.plan.payload_nbytes
        self._paths = state.tensor_paths
        self._literals = literal_sources(state.plan, cuts)
        self._starts = state.sources.offset_bytes
        self._planned_addresses = state.sources.addresses
        self.devices = accelerators(state.sources.all_devices())
        self._addresses: list[int] = []
        self._device_addresses: list[int] = []
        """Of the payloads on devices, when they were saved: no probe sees it when their memory becomes another's."""
        self._small_addresses: list[int] | None = None
        self._tiny = memoryview(b"")
        self._tiny_addresses: list[tuple[int, int]] = []
        """Payloads that were copied at once, and where to."""
        self._lock = Lock()

    def _find_addresses(self, *, again: bool) -> list[int]:
        """Where each payload's bytes lie; 0 on a device. CPU bytes are copied by address: no torch call per tensor."""
        if self._planned_addresses and not again and not self.devices:
            return list(map(add, self._planned_addresses, self._starts)) if any(self._starts) else self._planned_addresses
        storage_nbytes = list(map(torch.UntypedStorage.nbytes, self.storages))
        if not all(map(le, map(add, self._starts, self._payload_nbytes), storage_nbytes)):
            raise self._resized(storage_nbytes)
        addresses = list(map(add, map(torch.UntypedStorage.data_ptr, self.storages), self._starts))
        if not self.devices:
            return addresses
        on_devices = [address for address, storage in zip(addresses, self.storages, strict=True) if storage.device.type != "cpu"]
        if again and on_devices != self._device_addresses:
            raise TornSnapshotError(
                "a tensor's memory was given back and taken anew before its snapshot was taken. This checkpoint is not committed; "
                "older ones are untouched. Call wait_snapshot() before freeing tensors"
            )
        self._device_addresses = on_devices
        return [address if storage.device.type == "cpu" else 0 for address, storage in zip(addresses, self.storages, strict=True)]

    def _resized(self, storage_nbytes: list[int]) -> TornSnapshotError:
        ends = map(add, self._starts, self._payload_nbytes)
        end, now = next((end, now) for end, now in zip(ends, storage_nbytes, strict=True) if end > now)
        return TornSnapshotError(
            f"a tensor's storage was resized from {end} bytes or more to {now} before its snapshot was taken. This checkpoint is not "
            "committed; older ones are untouched. Call wait_snapshot() before freeing tensors"
        )

    def begin(self) -> None:
        """Find where the bytes lie, copy the tiny payloads, and note a few bytes of each other one.

        On the caller's thread, before the first `copy`.
        """
        payloads = self._find_addresses(again=False)
        on_devices = frozenset(k for k, address in enumerate(payloads) if not address) if self.devices else frozenset[int]()
        self._probes = self.cuts.probes.note(payloads, on_devices)
        tiny, nbytes = self.cuts.probes.tiny, self.cuts.probes.tiny_nbytes
        self._tiny = memoryview(bytearray(sum(nbytes)))
        if tiny:
            targets = list(accumulate(nbytes[:-1], initial=address_of(self._tiny)))
            sources = [payloads[k] for k in tiny]
            self._tiny_addresses = [(k, target) for k, source, target in zip(tiny, sources, targets, strict=True) if source]
            _copy_rows(0, targets, sources, [n if source else 0 for n, source in zip(nbytes, sources, strict=True)], is_urgent=True)
        self._set_addresses(payloads)

    def find_again(self) -> None:
        """Find where the bytes lie by now: the user may have moved them. On the thread that copies them."""
        self._set_addresses(self._find_addresses(again=True))

    def _set_addresses(self, payloads: list[int]) -> None:
        self._addresses = [*payloads, *map(_address_of, self._literals)]
        for k, address in self._tiny_addresses:
            self._addresses[k] = address
        self._small_addresses = None

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
        addresses = self._small_addresses
        if addresses is None:
            addresses = self._small_addresses = self.cuts.small_addresses(self._addresses)
        rows = self.cuts.small.rows(k)
        columns = [self.cuts.small.chunk_offsets[rows], addresses[rows], self.cuts.small.nbytes[rows]]
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
        large = (piece for piece in self.cuts.large[k] if piece.source < self.cuts.num_payloads)
        return chain(large, self.cuts.small.pieces(k))

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

    def compare_probes(self, k: int, chunk: StagingChunk) -> None:
        """Whether chunk `k`, which has been filled, holds what was noted. Any thread; `check_torn` tells."""
        if self._probes is not None:
            self._probes.compare(k, chunk.address)

    def check_torn(self, all_but: frozenset[int] = frozenset()) -> None:
        """Compare the version counters with those at plan time, and tell what the probes have found.

        Args:
            all_but: storages whose tensors are not copied yet, and are left for a later check; the others are final then.

        Raises:
            TornSnapshotError: something has changed; names up to ten tensors.
        """
        with self._lock:
            torn = self._changed()
            if all_but:
                later = [not all_but.isdisjoint(storage_ids(t)) for t in self._tensors]
                torn = [i for i in torn if not later[i]]
                self._versions = [v if is_later else None for v, is_later in zip(self._versions, later, strict=True)]
            else:
                torn = sorted({*torn, *self._with_changed_owners(), *self._with_changed_bytes()})
            paths = self._paths() if torn else []
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

    def _with_changed_owners(self) -> list[int]:
        """The tensors over storages that were changed through another tensor."""
        if version_counters(self._owners) == self._owner_versions:
            return []
        pairs = zip(self._owners, self._owner_versions, strict=True)
        ids = frozenset(chain.from_iterable(storage_ids(t) for t, v in pairs if v is not None and t._version != v))
        return [i for i, tensor in enumerate(self._tensors) if not ids.isdisjoint(storage_ids(tensor))]

    def _with_changed_bytes(self) -> list[int]:
        """The tensors that probes have found changed."""
        if self._probes is None or not self._probes.changed:
            return []
        places: dict[int, list[int]] = {}
        for payload, offset in self._probes.changed:
            places.setdefault(self.storages[payload]._cdata, []).append(self._starts[payload] + offset)
        over = [i for i, tensor in enumerate(self._tensors) if not places.keys().isdisjoint(storage_ids(tensor))]
        return [i for i in over if _covers(self._tensors[i], places)] or over

    def accept_changes(self) -> None:
        """From now on tensors may change: it is no sign of a torn snapshot. What has changed already still is."""
        with self._lock:
            changed = set(self._changed())
            self._versions = [v if i in changed else None for i, v in enumerate(self._versions)]
            pairs = zip(self._owners, self._owner_versions, strict=True)
            self._owner_versions = [v if v is not None and t._version != v else None for t, v in pairs]

    def finish_device_copies(self) -> None:
        """Return when no queued copy writes to a chunk any more, whatever interrupts the wait: the chunks are to be given up."""
        for device in self.devices:
            if device in self._streams:
                with contextlib.suppress(RuntimeError):  # The device is lost, and its copies with it.
                    uninterrupted(self._streams[device].synchronize)

    def drop_sources(self) -> None:
        """Let go of the user's tensors: their bytes are in the arena, and no change of theirs matters any more."""
        with self._lock:
            self._tensors = self._owners = ()
            self._versions, self._owner_versions = [], []
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


def storages_of(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """What holds the bytes of a dense tensor (of a DTensor's local part); nothing for other layouts, and without bytes."""
    local = getattr(tensor, "_local_tensor", tensor)
    if torch.nn.parameter.is_lazy(local):
        return []
    return [local.untyped_storage()] if local.layout == torch.strided else []


def storage_ids(tensor: torch.Tensor) -> list[int]:
    """`UntypedStorage._cdata` of `storages_of`."""
    return [storage._cdata for storage in storages_of(tensor)]


def _covers(tensor: torch.Tensor, places: dict[int, list[int]]) -> bool:
    """Whether one of the bytes at `places` (by storage) lies between the first and the last one of a dense tensor."""
    local = getattr(tensor, "_local_tensor", tensor)
    if not local.numel():
        return False
    item: int = local.element_size()
    start = local.storage_offset() * item
    end = start + item + item * sum((size - 1) * stride for size, stride in zip(local.size(), local.stride(), strict=True))
    return any(place < end and place + PROBE_BYTES > start for place in places.get(local.untyped_storage()._cdata, ()))
