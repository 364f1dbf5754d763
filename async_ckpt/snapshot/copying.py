"""How the bytes of a planned state get into staging chunks: cut at chunk boundaries, copied by the fastest way each allows.

Parts on the CPU are copied by memmove, in C-level loops, so that a tensor costs microseconds; CUDA parts are queued on a
side stream. Both release the GIL while they copy, but for small parts on a thread that somebody waits for: getting the GIL
back takes longer than copying them.
"""

from __future__ import annotations

import contextlib
import ctypes
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..errors import TornSnapshotError, UnsupportedStateError
from ..layout import FilePlan, PlannedState
from ..locks import Lock, uninterrupted
from ..staging import StagingChunk

OnCopied = Callable[[str, float, int, int], None]
"""Called with (kind "copy" or "d2h", start on ``time.perf_counter``, file offset, bytes) when a chunk's copy has ended."""

# Below this, copying takes less time than to give the GIL away and get it back from a busy thread.
_SMALL_BYTES = 64 << 10

_memmove = ctypes.CDLL(None).memmove
_memmove.restype = None
_memmove.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]
_memmove_holding_gil = ctypes.PyDLL(None).memmove
_memmove_holding_gil.restype = None
_memmove_holding_gil.argtypes = _memmove.argtypes

# How many copies one C-level loop makes before a signal is looked at (about 1 ms): with the GIL held for small parts.
_BATCH = 1000
_SMALL_BATCH = 100


@dataclass(frozen=True, slots=True)
class ChunkCut:
    """The payload parts of one chunk, as parallel lists."""

    offset: int
    nbytes: int
    payloads: list[int]
    source_offsets: list[int]
    chunk_offsets: list[int]
    sizes: list[int]


def cut(plan: FilePlan, chunk_bytes: int) -> list[ChunkCut]:
    """Cut a plan's payloads at chunk boundaries; pure data, one entry per chunk."""
    num_chunks = max(1, -(-plan.file_bytes // chunk_bytes))
    cuts = [ChunkCut(k * chunk_bytes, min(chunk_bytes, plan.file_bytes - k * chunk_bytes), [], [], [], []) for k in range(num_chunks)]
    for index, (offset, nbytes) in enumerate(zip(plan.payload_offsets, plan.payload_nbytes, strict=True)):
        done = 0
        while done < nbytes:
            k, start = divmod(offset + done, chunk_bytes)
            size = min(nbytes - done, chunk_bytes - start)
            piece = cuts[k]
            piece.payloads.append(index)
            piece.source_offsets.append(done)
            piece.chunk_offsets.append(start)
            piece.sizes.append(size)
            done += size
    return cuts


class Fill:
    """The sources of one file and how to copy their parts into chunks."""

    def __init__(
        self, state: PlannedState, cuts: list[ChunkCut], streams: dict[torch.device, torch.cuda.Stream], on_copied: OnCopied | None
    ) -> None:
        self.cuts = cuts
        self._on_copied = on_copied
        self._payload_nbytes = state.plan.payload_nbytes
        self._paths = state.tensor_paths
        self._streams = streams
        self.storages = state.sources.storage
        self._tensors: Sequence[torch.Tensor] = state.tensors
        self._versions = state.versions
        self._literals = state.plan.literals
        self._literal_offsets: list[int] = []
        self._starts = state.sources.offset_bytes
        devices = state.sources.all_devices()
        for device in devices:
            if device.type not in ("cpu", "cuda"):
                raise UnsupportedStateError(
                    f"a tensor lies on device '{device}', which cannot be snapshotted (cpu and cuda can); "
                    "move it with .cpu() before save. Nothing was written for this file"
                )
        self.devices = {device for device in devices if device.type == "cuda"}
        self._addresses: list[int] = []
        self._lock = Lock()

    def _find_addresses(self) -> list[int]:
        """Where each payload's bytes lie; 0 on a device. CPU bytes are copied by address: no torch call per tensor."""
        for storage, start, num_bytes in zip(self.storages, self._starts, self._payload_nbytes, strict=True):
            if storage.nbytes() < start + num_bytes:
                raise TornSnapshotError(
                    f"a tensor's storage was resized from {start + num_bytes} bytes or more to {storage.nbytes()} before its snapshot was "
                    "taken. This checkpoint is not committed; older ones are untouched. Call wait_snapshot() before freeing tensors"
                )
        bases = [storage.data_ptr() for storage in self.storages]
        if self.devices:
            bases = [base if storage.device.type == "cpu" else 0 for base, storage in zip(bases, self.storages, strict=True)]
        return [base + start if base else 0 for base, start in zip(bases, self._starts, strict=True)]

    @property
    def has_large_parts(self) -> bool:
        """Whether most of the time of its copy is spent without the GIL, so that threads can share it."""
        return not self.devices and self.cuts[-1].offset >= _SMALL_BYTES * sum(len(piece.sizes) for piece in self.cuts)

    def find_sources(self) -> None:
        """Before the first `copy`: where the bytes lie, for all threads."""
        if not self._addresses:
            self._addresses = self._find_addresses()
            self._literal_offsets = [offset for offset, _ in self._literals]

    def copy(self, k: int, chunk: StagingChunk, chosen: Sequence[bool] | None, *, is_urgent: bool = False) -> list[torch.cuda.Event]:
        """Copy the chosen payload parts (None: all) of chunk `k`; returns events of queued device copies.

        Args:
            is_urgent: hold the GIL for small parts, at most about 1 ms at a time.
        """
        piece = self.cuts[k]
        picked: Sequence[int] = range(len(piece.sizes))
        if chosen is not None:
            picked = [i for i in picked if chosen[piece.payloads[i]]]
        on_device: list[int] = []
        if self.devices:
            on_device = [i for i in picked if not self._addresses[piece.payloads[i]]]
            picked = [i for i in picked if self._addresses[piece.payloads[i]]]
        if is_urgent:
            small = [i for i in picked if piece.sizes[i] < _SMALL_BYTES]
            picked = [i for i in picked if piece.sizes[i] >= _SMALL_BYTES]
            self._copy_from_cpu(piece, small, chunk, _memmove_holding_gil, _SMALL_BATCH)
        self._copy_from_cpu(piece, picked, chunk, _memmove, _BATCH)
        return self._copy_from_devices(piece, on_device, chunk) if on_device else []

    def _copy_from_cpu(
        self, piece: ChunkCut, parts: Sequence[int], chunk: StagingChunk, move: Callable[[int, int, int], object], batch_size: int
    ) -> None:
        addresses, base = self._addresses, chunk.address
        for low in range(0, len(parts), batch_size):
            batch = parts[low : low + batch_size]
            targets = [base + piece.chunk_offsets[i] for i in batch]
            sources = [addresses[piece.payloads[i]] + piece.source_offsets[i] for i in batch]
            deque(map(move, targets, sources, [piece.sizes[i] for i in batch]), maxlen=0)

    def report(self, k: int, chosen: Sequence[bool] | None, began: float) -> None:
        """Tell the observers that the chosen parts of chunk `k` are copied."""
        if self._on_copied is None:
            return
        piece = self.cuts[k]
        num_bytes = piece.nbytes
        if chosen is not None:
            num_bytes = sum(size for payload, size in zip(piece.payloads, piece.sizes, strict=True) if chosen[payload])
        if num_bytes:
            self._on_copied("d2h" if self.devices else "copy", began, piece.offset, num_bytes)

    def copy_literals(self, k: int, chunk: StagingChunk) -> None:
        """Copy everything of chunk `k` that is not payload."""
        piece = self.cuts[k]
        view, end = chunk.view, piece.offset + piece.nbytes
        first = max(0, bisect_right(self._literal_offsets, piece.offset) - 1)
        last = bisect_left(self._literal_offsets, end)
        for offset, data in self._literals[first:last]:
            low, high = max(offset, piece.offset), min(offset + len(data), end)
            if low < high:
                view[low - piece.offset : high - piece.offset] = data[low - offset : high - offset]

    def _bytes_of(self, payload: int, offset: int, nbytes: int) -> torch.Tensor:
        storage = self.storages[payload]
        view = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return view.set_(storage, self._starts[payload] + offset, (nbytes,), (1,))

    def _copy_from_devices(self, piece: ChunkCut, parts: list[int], chunk: StagingChunk) -> list[torch.cuda.Event]:
        by_device: dict[torch.device, list[int]] = {}
        for i in parts:
            by_device.setdefault(self.storages[piece.payloads[i]].device, []).append(i)
        events = []
        for device, indices in by_device.items():
            with torch.cuda.stream(self._stream(device)):
                for i in indices:
                    source = self._bytes_of(piece.payloads[i], piece.source_offsets[i], piece.sizes[i])
                    low = piece.chunk_offsets[i]
                    chunk.tensor[low : low + piece.sizes[i]].copy_(source, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            events.append(event)
        return events

    def _stream(self, device: torch.device) -> torch.cuda.Stream:
        stream = self._streams.get(device)
        if stream is None:
            stream = self._streams[device] = torch.cuda.Stream(device)
        return stream

    def record_callers(self) -> dict[torch.device, torch.cuda.Event]:
        """Mark, on the caller's streams, the point after which the sources are final."""
        events = {}
        for device in self.devices:
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            events[device] = event
        return events

    def wait_callers(self, events: dict[torch.device, torch.cuda.Event]) -> None:
        """Order the side streams behind the callers' events; does not block the CPU."""
        for device, event in events.items():
            self._stream(device).wait_event(event)

    @staticmethod
    def wait_devices(events: list[torch.cuda.Event]) -> None:
        """Block this thread (not the GIL) until the queued copies ended."""
        for event in events:
            event.synchronize()

    def check_versions(self, all_but: frozenset[int] = frozenset()) -> None:
        """Compare the version counters with those at plan time; tensors found unchanged are final and not looked at again.

        Args:
            all_but: storages whose tensors are not copied yet, and are left for a later check.

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


def storage_ids(tensor: torch.Tensor) -> list[int]:
    """`UntypedStorage._cdata` of the bytes of a dense tensor (of a DTensor's local part); empty for other layouts."""
    local = getattr(tensor, "_local_tensor", tensor)
    return [local.untyped_storage()._cdata] if local.layout == torch.strided else []
