"""Moves verified file bytes to where they belong in memory, many threads at once.

Guarantees:
- Each byte of a piece is written exactly once per `stream`; nothing outside the pieces is touched.
- When `__call__` has returned, the bytes are where they belong, on a device too.
- After `Rollback.roll_back` every byte that was overwritten has its old value again.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from functools import partial

import torch

from ..errors import TransactionStateError
from ..host.device import Pinning, beside_captures, on_stream, refuse_capture, synchronize
from ..host.memory import HUGE_PAGE_BYTES, address_of, advise_huge_pages, move, region, view_at
from ..threads.locks import Lock
from .verified_file import Lent, MemorySource, VerifiedFile, borrow

_CPU = torch.device("cpu")


class Scatter:
    """Where the bytes of a file go: a `verified_file.Consume`. Fill with `add`, then call from any thread."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int, int, torch.Tensor | None]] = []
        self._fresh: set[int] = set()
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._keep_alive: list[object] = []
        self.streams: dict[torch.device, torch.Stream] = {}
        """What was current on the caller's thread: there the memory was allocated, and may have been used before."""

    def add(
        self,
        file_offset: int,
        num_bytes: int,
        storage: torch.UntypedStorage,
        storage_offset_bytes: int = 0,
        *,
        fresh: bool = False,
    ) -> None:
        """Bytes from `file_offset` on go into `storage`, which is kept alive until the scatter is dropped; `fresh`:
        nobody has seen this memory yet."""
        if storage_offset_bytes < 0 or storage_offset_bytes + num_bytes > storage.nbytes():
            raise ValueError(f"{num_bytes} bytes at {storage_offset_bytes} do not fit a storage of {storage.nbytes()}")
        if num_bytes == 0:
            return
        self._keep_alive.append(storage)
        target = None
        address = storage.data_ptr() + storage_offset_bytes
        # The name of a device's type is made anew at each look.
        if storage.device != _CPU and storage.device.type != "cpu":
            self.streams.setdefault(storage.device, torch.accelerator.current_stream(storage.device))
            target = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(
                storage, storage_offset_bytes, (num_bytes,), (1,)
            )
        self._pieces.append((file_offset, num_bytes, address, target))
        if fresh:
            self._fresh.add(address)

    def freeze(self) -> None:
        """Sort the pieces; no `add` after it. Pieces may overlap in the file (tied weights read into separate tensors).
        Raises TransactionStateError: the caller captures a graph."""
        refuse_capture("a file cannot be read into tensors", self.streams)
        self._pieces.sort(key=lambda piece: piece[0])
        self._starts = [piece[0] for piece in self._pieces]
        # Running maximum: with overlapping pieces the ends alone are not sorted, and bisect needs them to be.
        self._ends = []
        furthest = 0
        for offset, num_bytes, _, _ in self._pieces:
            furthest = max(furthest, offset + num_bytes)
            self._ends.append(furthest)

    @property
    def num_target_bytes(self) -> int:
        """Bytes of CPU memory, not fresh, that are written to."""
        return sum(size for _, size, address, target in self._pieces if target is None and address not in self._fresh)

    def targets(self, offset: int, num_bytes: int) -> Iterator[tuple[int, int]]:
        """Address and size of the CPU memory, not fresh, that the file bytes [offset, offset + num_bytes) go to."""
        end = offset + num_bytes
        for start, size, address, target in self._pieces_in(offset, end):
            low, high = max(start, offset), min(start + size, end)
            if low < high and target is None and address not in self._fresh:
                yield address + low - start, high - low

    def __call__(self, offset: int, view: memoryview) -> None:
        """Move what lies in the file bytes [offset, offset + len(view)); for a device, `view` must be writable memory
        (it is not written)."""
        end = offset + len(view)
        source = address_of(view) - offset
        tensor = torch.frombuffer(view, dtype=torch.uint8) if self.streams else None
        try:
            for start, num_bytes, address, target in self._pieces_in(offset, end):
                low, high = max(start, offset), min(start + num_bytes, end)
                if low >= high:
                    continue
                if target is None or tensor is None:
                    move(address + low - start, source + low, high - low)
                    continue
                with on_stream(self.streams[target.device]):
                    target[low - start : high - start].copy_(tensor[low - offset : high - offset], non_blocking=True)
        finally:
            # The block is reused as soon as this returns.
            synchronize(self.streams.values())

    def _pieces_in(self, offset: int, end: int) -> list[tuple[int, int, int, torch.Tensor | None]]:
        return self._pieces[bisect_right(self._ends, offset) : bisect_right(self._starts, end - 1)]


class Rollback:
    """Lets `scatter` write into existing tensors while a file is still being read, and takes it back if the file turns
    out bad: then every byte has its old value again, also where pieces overlap.

    The old bytes are set aside, in memory of `region_bytes` at a time, while the disk is being waited for, which
    holding the new ones until the last is verified cannot use. Any thread; `close` gives lent memory back.
    """

    def __init__(self, scatter: Scatter, lend: MemorySource | None, region_bytes: int) -> None:
        self._scatter = scatter
        self._lend = lend
        self._region_bytes = region_bytes
        self._lock = Lock()
        self._writing: set[int] = set()
        """The threads that are writing now."""
        self._is_over = False
        self._log: list[tuple[int, int, int]] = []
        """(target address, address of its old bytes, size), in the order in which they were set aside."""
        self._regions: list[Lent] = []
        self._left = 0
        self._next = 0

    def __call__(self, offset: int, view: memoryview) -> None:
        """Set aside, then overwrite; does nothing once the roll-back has begun."""
        with self._lock:
            if self._is_over:
                return
            self._writing.add(threading.get_ident())
        try:
            self._overwrite(offset, view)
        finally:
            with self._lock:
                self._writing.discard(threading.get_ident())
                self._lock.notify_all()

    def _overwrite(self, offset: int, view: memoryview) -> None:
        targets = [(address, size) for address, size in self._scatter.targets(offset, view.nbytes) if size]
        if targets:
            at = self._take(sum(size for _, size in targets))
            entries = []
            for address, size in targets:
                move(at, address, size)
                entries.append((address, at, size))
                at += size
            # Whoever writes to the same bytes later has set aside what this thread wrote, and stands behind this in the
            # log.
            with self._lock:
                self._log += entries
        self._scatter(offset, view)

    def _take(self, num_bytes: int) -> int:
        """Address of memory for `num_bytes` old bytes."""
        with self._lock:
            if num_bytes > self._left:
                self._regions.append(borrow(self._lend, max(num_bytes, self._region_bytes)))
                memory = self._regions[-1][0]
                self._left, self._next = memory.nbytes, address_of(memory)
            at = self._next
            self._next += num_bytes
            self._left -= num_bytes
        return at

    def roll_back(self) -> None:
        """Write every old byte back; may be called again where it was interrupted. Blocks for writes under way and one
        copy: several interrupts in a row may have left threads that read."""
        with self._lock:
            self._is_over = True
            # What this thread was writing was interrupted, or there would be no roll-back.
            while not self._writing <= {threading.get_ident()}:
                self._lock.wait()
        for address, saved, size in reversed(self._log):
            move(address, saved, size)
        self._log.clear()

    def close(self) -> None:
        """Forget the old bytes."""
        self._log.clear()
        while self._regions:
            self._regions.pop()[1]()


def _pinned_memory(pinning: Pinning, num_bytes: int) -> memoryview:
    """A device copies from it at full rate, and torch caches it for the next load; pageable where the device has
    none."""
    try:
        memory = pinning.allocate(num_bytes)
    except TransactionStateError:
        return region(num_bytes)
    return view_at(memory.data_ptr(), num_bytes, owner=memory)


def stream_into(file: VerifiedFile, scatter: Scatter, extents: Iterable[int] | None = None) -> None:
    """Read `extents` (None: all) into the scatter's memory, by pinned blocks where some is on a device. Blocks."""
    buffers = file.buffers
    if scatter.streams:
        buffers = buffers._replace(new=partial(_pinned_memory, Pinning(next(iter(scatter.streams.values())))))
    file.stream(scatter, extents, buffers)


def new_storage(num_bytes: int, device: torch.device) -> torch.UntypedStorage:
    """Fresh, uninitialised memory, on the CPU backed by huge pages where the kernel gives them: its first touch is the
    slowest step of a load, and they make it 512 times rarer."""
    with beside_captures(device):
        storage = torch.UntypedStorage(num_bytes, device=device)
    if num_bytes >= 2 * HUGE_PAGE_BYTES and device.type == "cpu":
        advise_huge_pages(storage.data_ptr(), num_bytes)
    return storage
