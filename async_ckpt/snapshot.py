"""The copy in RAM: moves a planned state into staging chunks, at once (eager) or behind the next step (lazy).

Guarantees:
- Chunk k of a file holds its bytes [k*C, (k+1)*C); it reaches the writer as soon as those bytes are copied.
- Eager: when `take` returns, every source byte has been copied. Lazy: the same for every storage that is not
  guarded; guarded ones are copied in the background, and `SnapshotJob.copied` says when they are safe to change.
- A tensor whose version counter moved between plan and end of copy fails the file with `TornSnapshotError`.
- Sources are kept alive until their copy has ended.

Which thread: `take` on the caller's thread; lazy fills on the writer pool's one copy thread, in the order of the saves,
so a lazy fill never waits for another chunk (its chunks are reserved before it is queued).
"""

from __future__ import annotations

import ctypes
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from .errors import TornSnapshotError, UnsupportedStateError
from .layout import FilePlan, PlannedState
from .staging import StagingArena, StagingChunk
from .writer import Chunk, FileWrite

# Above this, torch's own multi-threaded copy beats one memmove; below it, the call overhead of torch dominates.
_PARALLEL_COPY_BYTES = 1 << 20

_memmove = ctypes.CDLL(None).memmove
_memmove.restype = None
_memmove.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]

# How many small copies one C-level loop makes before other threads may take the GIL (about 0.5 ms).
_BATCH = 1000


OnCopied = Callable[[str, float, int, int], None]
"""Called with (kind "copy" or "d2h", start on ``time.perf_counter``, file offset, bytes) when a chunk's copy has ended."""


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


@dataclass(slots=True)
class SnapshotJob:
    """One file's snapshot. `copied` resolves when no source byte is needed any more."""

    copied: Future[None] = field(default_factory=Future)
    enqueued: Future[None] = field(default_factory=Future)
    """Resolves when all device copies are queued, i.e. when `events` is complete."""
    events: list[torch.cuda.Event] = field(default_factory=list)
    mode: str = "eager"
    backpressure_s: float = 0.0
    copy_s: float = 0.0


class Snapshotter:
    """Copies planned states into an arena. One per engine; `take` is called by one thread at a time."""

    def __init__(self, arena: StagingArena, submit_copy: Callable[[Callable[[], None]], Future[None]], *, timeout_s: float) -> None:
        self._arena = arena
        self._submit_copy = submit_copy
        self._timeout_s = timeout_s
        self._cuts: dict[str, tuple[Sequence[int], int, list[ChunkCut]]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def take(
        self, state: PlannedState, write: FileWrite, *, guarded: frozenset[int], name: str, on_copied: OnCopied | None = None
    ) -> SnapshotJob:
        """Snapshot `state` into chunks and hand them to `write`.

        Blocks for the copy of everything that is not guarded, and for free staging memory (backpressure).

        Args:
            guarded: `UntypedStorage._cdata` of storages that cannot change before the guard's hook has waited.
            name: cache key, the file's path inside its tag.
            on_copied: told about each chunk's copy, on the thread that did it.

        Raises:
            TornSnapshotError: tensors changed while they were copied.
            BackpressureTimeout: the disk freed no chunk in time.
            UnsupportedStateError: a storage's device cannot be copied from.
        """
        fill = _Fill(state, self._cuts_for(state.plan, name), self._streams, on_copied)
        job = SnapshotJob()
        is_lazy = [storage._cdata in guarded for storage in fill.storages] if guarded else []
        reserved = self._arena.try_reserve(len(fill.cuts)) if any(is_lazy) or fill.devices else None
        if reserved is None:
            self._stream_through(fill, write, job)
        else:
            self._reserved(fill, reserved, write, job, is_lazy or [False] * len(fill.storages), guarded)
        return job

    def _cuts_for(self, plan: FilePlan, name: str) -> list[ChunkCut]:
        known = self._cuts.get(name)
        if known is not None and known[0] is plan.payload_offsets and known[1] == plan.file_bytes:
            return known[2]
        cuts = cut(plan, self._arena.chunk_bytes)
        if len(self._cuts) > 64:
            self._cuts.clear()
        self._cuts[name] = (plan.payload_offsets, plan.file_bytes, cuts)
        return cuts

    def _stream_through(self, fill: _Fill, write: FileWrite, job: SnapshotJob) -> None:
        """Eager, chunk by chunk, as the disk frees them: works for a state of any size."""
        job.mode = "streamed" if len(fill.cuts) > self._arena.num_chunks else "eager"
        fill.wait_callers(fill.record_callers())
        for k, piece in enumerate(fill.cuts):
            before = time.perf_counter()
            chunk = self._arena.acquire(self._timeout_s)
            started = time.perf_counter()
            job.backpressure_s += started - before
            try:
                fill.wait_devices(fill.copy(k, chunk, None, parallel=True))
                if k == len(fill.cuts) - 1:
                    fill.check_versions()
            except BaseException:
                self._arena.release(chunk)
                raise
            job.copy_s += time.perf_counter() - started
            fill.report(k, None, started)
            write.submit(self._chunk(piece, chunk, None))
        job.enqueued.set_result(None)
        job.copied.set_result(None)

    def _reserved(
        self,
        fill: _Fill,
        chunks: list[StagingChunk],
        write: FileWrite,
        job: SnapshotJob,
        is_lazy: list[bool],
        guarded: frozenset[int],
    ) -> None:
        """All chunks are ours: copy what may change, queue the rest, and return."""
        started = time.perf_counter()
        ready: list[Future[None]] = [Future() for _ in chunks]
        for piece, chunk, future in zip(fill.cuts, chunks, ready, strict=True):
            write.submit(self._chunk(piece, chunk, future))
        try:
            callers = fill.record_callers()
            if not all(is_lazy):
                fill.wait_callers(callers)
                is_eager = [not lazy for lazy in is_lazy]
                queued = [fill.copy_timed(k, chunk, is_eager, parallel=True) for k, chunk in enumerate(chunks)]
                for k, (events, began) in enumerate(queued):
                    fill.wait_timed(k, events, is_eager, began)
                    if not any(is_lazy) and k < len(chunks) - 1:
                        ready[k].set_result(None)
            fill.check_versions(all_but=guarded)
        except BaseException as error:
            _fail(error, job, ready)
            raise
        job.copy_s = time.perf_counter() - started
        if any(is_lazy):
            job.mode = "lazy"
            chosen = None if all(is_lazy) else is_lazy
            done = self._submit_copy(lambda: self._fill_lazily(fill, chunks, ready, job, chosen, callers))
            done.add_done_callback(lambda future: _fail_unstarted(future, job, ready))
        else:
            self._finish(fill, ready, job)

    def _fill_lazily(
        self,
        fill: _Fill,
        chunks: list[StagingChunk],
        ready: list[Future[None]],
        job: SnapshotJob,
        chosen: list[bool] | None,
        callers: dict[torch.device, torch.cuda.Event],
    ) -> None:
        started = time.perf_counter()
        try:
            fill.wait_callers(callers)
            queued = []
            for k, chunk in enumerate(chunks):
                queued.append(fill.copy_timed(k, chunk, chosen, parallel=False))
                if not fill.devices and k < len(chunks) - 1:
                    ready[k].set_result(None)
            job.events.extend(event for per_chunk, _ in queued for event in per_chunk)
            job.enqueued.set_result(None)
            for k, (per_chunk, began) in enumerate(queued):
                fill.wait_timed(k, per_chunk, chosen, began)
                if not ready[k].done() and k < len(chunks) - 1:
                    ready[k].set_result(None)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits for this snapshot
            _fail(error, job, ready)
            return
        job.copy_s += time.perf_counter() - started
        self._finish(fill, ready, job)

    @staticmethod
    def _finish(fill: _Fill, ready: list[Future[None]], job: SnapshotJob) -> None:
        """The last chunk goes out only after the version counters agreed, so that a torn file can never be complete."""
        try:
            fill.check_versions()
        except TornSnapshotError as error:
            _fail(error, job, ready)
            return
        for future in ready:
            if not future.done():
                future.set_result(None)
        fill.drop_sources()
        if not job.enqueued.done():
            job.enqueued.set_result(None)
        job.copied.set_result(None)

    def _chunk(self, piece: ChunkCut, chunk: StagingChunk, ready: Future[None] | None) -> Chunk:
        return Chunk(
            offset=piece.offset,
            nbytes=piece.nbytes,
            buffer=chunk.view,
            ready=ready,
            release=lambda: self._arena.release(chunk),
        )


def _fail(error: BaseException, job: SnapshotJob, ready: list[Future[None]]) -> None:
    for future in (*ready, job.enqueued, job.copied):
        if not future.done():
            future.set_exception(error)


def _fail_unstarted(done: Future[None], job: SnapshotJob, ready: list[Future[None]]) -> None:
    """The copy thread died or was shut down before it ran the job: its waiters must learn it."""
    error = done.exception()
    if error is not None:
        _fail(error, job, ready)


class _Fill:
    """The sources of one file and how to copy their parts into chunks."""

    def __init__(
        self, state: PlannedState, cuts: list[ChunkCut], streams: dict[torch.device, torch.cuda.Stream], on_copied: OnCopied | None
    ) -> None:
        self.cuts = cuts
        self._on_copied = on_copied
        self._state = state
        self._streams = streams
        self.storages = state.sources.storage
        self._tensors: Sequence[torch.Tensor] = state.tensors
        self._versions = version_counters(state.tensors)
        self._literals = state.plan.literals
        self._literal_offsets = [offset for offset, _ in self._literals]
        self._starts = state.sources.offset_bytes
        kinds = {storage.device for storage in self.storages}
        for device in kinds:
            if device.type not in ("cpu", "cuda"):
                raise UnsupportedStateError(
                    f"a tensor lies on device '{device}', which cannot be snapshotted (cpu and cuda can); "
                    "move it with .cpu() before save. Nothing was written for this file"
                )
        self.devices = {device for device in kinds if device.type == "cuda"}
        # A storage on the CPU is copied by address: no per-tensor torch call on the hot path.
        self._addresses = [
            storage.data_ptr() + start if storage.device.type == "cpu" else 0
            for storage, start in zip(self.storages, self._starts, strict=True)
        ]

    def copy(self, k: int, chunk: StagingChunk, chosen: Sequence[bool] | None, *, parallel: bool) -> list[torch.cuda.Event]:
        """Copy the chosen payload parts (None: all) and the literals of chunk `k`; returns events of queued device copies."""
        piece = self.cuts[k]
        self._copy_literals(piece, chunk)
        picked = range(len(piece.sizes)) if chosen is None else [i for i, p in enumerate(piece.payloads) if chosen[p]]
        small: list[int] = []
        on_device: list[int] = []
        for i in picked:
            if self._addresses[piece.payloads[i]] == 0:
                on_device.append(i)
            elif parallel and piece.sizes[i] >= _PARALLEL_COPY_BYTES:
                self._copy_large(piece, i, chunk)
            else:
                small.append(i)
        addresses, base = self._addresses, chunk.address
        for low in range(0, len(small), _BATCH):
            batch = small[low : low + _BATCH]
            targets = [base + piece.chunk_offsets[i] for i in batch]
            sources = [addresses[piece.payloads[i]] + piece.source_offsets[i] for i in batch]
            deque(map(_memmove, targets, sources, [piece.sizes[i] for i in batch]), maxlen=0)
        return self._copy_from_devices(piece, on_device, chunk) if on_device else []

    def copy_timed(
        self, k: int, chunk: StagingChunk, chosen: Sequence[bool] | None, *, parallel: bool
    ) -> tuple[list[torch.cuda.Event], float]:
        """As `copy`, with the time it began; reports the copy unless devices still have to do it (see `wait_timed`)."""
        began = time.perf_counter()
        events = self.copy(k, chunk, chosen, parallel=parallel)
        if not events:
            self.report(k, chosen, began)
        return events, began

    def wait_timed(self, k: int, events: list[torch.cuda.Event], chosen: Sequence[bool] | None, began: float) -> None:
        """Wait for the device copies of chunk `k` and report them."""
        if events:
            self.wait_devices(events)
            self.report(k, chosen, began)

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

    def _copy_literals(self, piece: ChunkCut, chunk: StagingChunk) -> None:
        view, end = chunk.view, piece.offset + piece.nbytes
        first = max(0, bisect_right(self._literal_offsets, piece.offset) - 1)
        for offset, data in self._literals[first:]:
            if offset >= end:
                break
            low, high = max(offset, piece.offset), min(offset + len(data), end)
            if low < high:
                view[low - piece.offset : high - piece.offset] = data[low - offset : high - offset]

    def _bytes_of(self, payload: int, offset: int, nbytes: int) -> torch.Tensor:
        storage = self.storages[payload]
        view = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return view.set_(storage, self._starts[payload] + offset, (nbytes,), (1,))

    def _copy_large(self, piece: ChunkCut, i: int, chunk: StagingChunk) -> None:
        source = self._bytes_of(piece.payloads[i], piece.source_offsets[i], piece.sizes[i])
        low = piece.chunk_offsets[i]
        chunk.tensor[low : low + piece.sizes[i]].copy_(source)

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
        versions = self._versions
        torn = [i for i, (t, v) in enumerate(zip(self._tensors, versions, strict=True)) if v is not None and t._version != v]
        if all_but:
            later = [any(s in all_but for s in storage_ids(t)) for t in self._tensors]
            torn = [i for i in torn if not later[i]]
            self._versions = [v if is_later else None for v, is_later in zip(versions, later, strict=True)]
        if not torn:
            return
        paths = self._state.tensor_paths()
        names = tuple(paths[i] for i in torn)
        shown = ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
        raise TornSnapshotError(
            f"{len(names)} tensor(s) changed while their snapshot was being taken: {shown}. This checkpoint is not committed; "
            "older ones are untouched. Call wait_snapshot() before changing tensors, or guard the optimizer that changes them",
            names,
        )

    def drop_sources(self) -> None:
        """Let go of the user's tensors: their bytes are in the arena now."""
        self._tensors = ()
        self._versions = []
        self.storages = []


def storage_ids(tensor: torch.Tensor) -> list[int]:
    """`UntypedStorage._cdata` of the bytes of a dense tensor (of a DTensor's local part); empty for other layouts."""
    local = getattr(tensor, "_local_tensor", tensor)
    return [local.untyped_storage()._cdata] if local.layout == torch.strided else []


def version_counters(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """Version counter of each tensor; None for inference tensors, which keep none."""
    try:
        return [t._version for t in tensors]
    except RuntimeError:
        return [None if t.is_inference() else t._version for t in tensors]
