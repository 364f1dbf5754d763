"""Where the bytes of a file lie in memory, and copies of them: of what the CPU can read by address, in loops in C; of
what lies on devices on side streams.

A tensor costs microseconds. The copies release the GIL, but for small pieces: getting it back takes longer than copying
them. Neither queueing nor ordering on a device blocks the CPU.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import compress, repeat
from operator import add, le

import torch

from ..errors import TornSnapshotError
from ..host.device import accelerators, keep_for, on_stream, plain_torch, record_now, side_stream, synchronize
from ..host.memory import address_of, move, move_holding_gil, move_releasing_gil
from ..plan.plan import PlannedState
from ..plan.strided import row_major_bytes
from ..threads.locks import uninterrupted
from .arena import StagingChunk
from .chunk_map import ChunkMap, LargePiece

_BATCH = 100
"""So many small pieces are copied by one loop in C before a signal is looked at: under 1 ms, with the GIL held."""
_BLOCK_ELEMENTS = 32767
"""So many elements of a strided payload are put in order outside the staging memory at a time, by each thread: from one
more on torch would start threads of its own for each thread of ours."""

_OUTCOME = "This checkpoint is not committed; older ones are untouched. Call wait_snapshot() before freeing tensors"


class Payloads:
    """The payloads of one planned state, by number, and the file's literals behind them. Keeps the storages alive. One
    thread at a time, but for `fill`.

    Raises:
        UnsupportedStateError: a storage's device cannot be copied from.
        TornSnapshotError: a storage has become shorter since it was planned.
    """

    def __init__(self, state: PlannedState, chunk_map: ChunkMap) -> None:
        self.devices = accelerators(state.devices)
        self.storages = state.storages
        """To be replaced by nothing once they are not needed any more."""
        self._starts = state.starts
        self._nbytes = state.plan.payload_nbytes
        self._strided = state.plan.strided
        self._map = chunk_map
        literals = state.plan.literals
        numbers = (0, None, -1, *chunk_map.long_literals)
        self._literals = [chunk_map.middle if k is None else literals[k][1] for k in numbers]
        self.on_devices: dict[int, torch.device] = {}
        """By number, the payloads on devices."""
        if self.devices:
            devices = [storage.device for storage in self.storages]
            self.on_devices = {k: device for k, device in enumerate(devices) if device.type != "cpu"}
        self.addresses = planned = state.addresses
        """Of the first bytes of payloads that the CPU can read; 0 for the others."""
        self._device_addresses: dict[int, int] = {}
        """Of the others."""
        if not planned or self.devices:
            self._look()
        elif any(self._starts):
            self.addresses = list(map(add, planned, self._starts))
        self._sources: list[int] = []
        """The addresses of everything that `fill` copies; 0 for what it cannot."""
        self._small_sources: list[int] = []

    def __len__(self) -> int:
        """With the literals."""
        return len(self._starts) + len(self._literals)

    def look_again(self, wanted: Sequence[bool] | None) -> None:
        """Find the addresses again of what is wanted (None: of everything): the user may have moved the bytes. Raises
        TornSnapshotError: a storage has become shorter, or a device's memory was given back meanwhile: no probe sees
        what another owner has put there."""
        before, self._sources = self._device_addresses, []
        self._look(wanted)
        if any(before[k] != now for k, now in self._device_addresses.items() if wanted is None or wanted[k]):
            raise TornSnapshotError(
                f"a tensor's memory was given back and taken anew before its snapshot was taken. {_OUTCOME}"
            )

    def prepare(self, copies: Iterable[tuple[int, int]]) -> None:
        """To be called before `fill`. `copies`: payloads that are read elsewhere, and where."""
        if not self._sources:
            sources = [*self.addresses, *(address_of(memoryview(data)) for data in self._literals)]
            for k, address in copies:
                sources[k] = address
            starts = self._map.pick_small(sources)
            self._sources, self._small_sources = sources, list(map(add, starts, self._map.small.source_offsets))

    def fill(
        self, k: int, chunk: StagingChunk, wanted: Sequence[bool] | None, *, completes: bool, is_urgent: bool
    ) -> None:
        """Copy what is wanted (None: everything) of chunk `k`, as far as the CPU can read it; if that `completes` it,
        with the literals between payloads. If it `is_urgent`, the GIL is kept between small pieces too. Several threads
        may."""
        if completes:
            self._fill_between(k, chunk, is_urgent)
        small = self._map.small
        rows = small.rows[k]
        columns = [small.chunk_offsets[rows], self._small_sources[rows], small.nbytes[rows]]
        if wanted is not None:
            chosen = list(map(wanted.__getitem__, small.sources[rows]))
            columns = [list(compress(column, chosen)) for column in columns]
        _copy_rows(chunk.address, *columns, is_urgent=is_urgent)
        for piece in self._map.large[k]:
            if self._sources[piece.source] and (wanted is None or wanted[piece.source]):
                self._copy(piece, chunk.address + piece.chunk_offset)

    def read(self, payload: int, offset: int, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The memory that a payload is in, and some bytes of it: a part of that, or a copy on their device that the
        current stream makes."""
        storage, start = self.storages[payload], self._starts[payload]
        with plain_torch():
            memory = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        layout = self._strided.get(payload)
        if layout is None:
            return memory, memory[start + offset :][:nbytes]
        return memory, row_major_bytes(layout.memory(storage, start), offset, nbytes)

    def _look(self, wanted: Sequence[bool] | None = None) -> None:
        storage_nbytes = list(map(torch.UntypedStorage.nbytes, self.storages))
        ends = list(map(add, self._starts, self._nbytes))
        for k, layout in self._strided.items():
            ends[k] = self._starts[k] + layout.span_bytes
        if not all(map(le, ends, storage_nbytes)):
            for k, (end, now) in enumerate(zip(ends, storage_nbytes, strict=True)):
                if end > now and (wanted is None or wanted[k]):
                    raise TornSnapshotError(
                        f"a tensor's storage was resized from {end} bytes or more to {now} before its snapshot was "
                        f"taken. {_OUTCOME}"
                    )
        self.addresses = list(map(add, map(torch.UntypedStorage.data_ptr, self.storages), self._starts))
        self._device_addresses = {k: self.addresses[k] for k in self.on_devices}
        for k in self.on_devices:
            self.addresses[k] = 0

    def _copy(self, piece: LargePiece, target: int) -> None:
        if piece.source not in self._strided:
            move_releasing_gil(target, self._sources[piece.source] + piece.source_offset, piece.nbytes)
            return
        # An element that two blocks share is copied for both.
        block_bytes = (_BLOCK_ELEMENTS - 1) * self._strided[piece.source].dtype.itemsize
        for done in range(0, piece.nbytes, block_bytes):
            nbytes = min(block_bytes, piece.nbytes - done)
            _, block = self.read(piece.source, piece.source_offset + done, nbytes)
            move(target + done, block.data_ptr(), nbytes)

    def _fill_between(self, k: int, chunk: StagingChunk, is_urgent: bool) -> None:
        """The literals between payloads: they depend on the layout alone, and may be there from the save before."""
        key = (self._map.key, k)
        if chunk.former_key != key:
            between = self._map.between
            rows = between.rows[k]
            middle = address_of(memoryview(self._map.middle))
            addresses = list(map(add, between.source_offsets[rows], repeat(middle)))
            _copy_rows(chunk.address, between.chunk_offsets[rows], addresses, between.nbytes[rows], is_urgent=is_urgent)
        chunk.resident_key = key


class SideStreams:
    """One stream per device, made when it is first needed. Any thread."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.Stream] = {}

    def order_behind(self, callers: Mapping[torch.device, torch.Event]) -> None:
        """What is queued from here on begins after these points on the caller's streams."""
        for device, event in callers.items():
            self._stream(device).wait_event(event)

    def queue(
        self, device: torch.device, copies: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    ) -> torch.Event:
        """Queue copies from one device to the host; returns what ends them. `copies`: memory that is read, its bytes,
        and where they go; each made on the side stream when it is asked for."""
        stream = self._stream(device)
        with on_stream(stream):
            for memory, source, target in copies:
                keep_for(memory, stream)
                target.copy_(source, non_blocking=True)
            return record_now(device)

    def finish(self, devices: Iterable[torch.device]) -> None:
        """Return when no queued copy writes to a chunk any more, whatever interrupts the wait: the chunks are to be
        given up."""
        for device in devices:
            if device in self._streams:
                with contextlib.suppress(RuntimeError):  # The device is lost, and its copies with it.
                    uninterrupted(partial(synchronize, [self._streams[device]]))

    def _stream(self, device: torch.device) -> torch.Stream:
        # Both the caller's thread and the copy thread may be the first.
        return self._streams.get(device) or self._streams.setdefault(device, side_stream(device))


def _copy_rows(base: int, offsets: list[int], sources: list[int], nbytes: list[int], *, is_urgent: bool) -> None:
    """Copy `nbytes[i]` bytes from address `sources[i]` to `base + offsets[i]`."""
    for low in range(0, len(nbytes), _BATCH):
        batch = slice(low, low + _BATCH)
        deque(map(move_holding_gil, map(base.__add__, offsets[batch]), sources[batch], nbytes[batch]), maxlen=0)
        if not is_urgent:
            time.sleep(0)
