"""The copy in RAM: moves a planned state into staging chunks, at once (eager) or behind the next step (lazy).

Guarantees:
- Chunk k of a file holds its bytes [k*C, (k+1)*C); it reaches the writer as soon as those bytes are copied.
- Eager: when `take` returns, every source byte has been copied. Lazy: the same for every storage that is not
  guarded; guarded ones are copied in the background, and `SnapshotJob.copied` says when they are safe to change.
- A tensor whose version counter moved before its copy ended fails the file with `TornSnapshotError`: the last chunk
  goes out only after the counters agreed, so that a torn file can never be complete.
- Sources are kept alive until their copy has ended; every chunk is handed to the writer or given back.

Which thread: `take` on the caller's thread; lazy fills on the writer pool's one copy thread, in the order of the saves,
so a lazy fill never waits for another chunk (its chunks are reserved before it is queued).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from ..layout import FilePlan, PlannedState
from ..locks import Condition
from ..staging import StagingArena, StagingChunk
from ..writer import Chunk, FileWrite
from .copying import ChunkCut, Fill, OnCopied, cut

# How long after a save its lazy copy waits for the next one: a checkpoint's files are saved within milliseconds of each other.
_PATIENCE_S = 0.01


class _Courtesy:
    """Lets a caller who is still planning go first: a lazy copy that competes with it for the GIL would be stall."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._num_planning = 0
        self._until_s = 0.0

    @contextmanager
    def extended(self) -> Iterator[None]:
        with self._changed:
            self._num_planning += 1
            self._until_s = float("inf")
        try:
            yield
        finally:
            with self._changed:
                self._num_planning -= 1
                if self._num_planning == 0 and self._until_s:
                    self._until_s = time.monotonic() + _PATIENCE_S
                self._changed.notify_all()

    def end(self) -> None:
        with self._changed:
            self._until_s = 0.0
            self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            while (left_s := self._until_s - time.monotonic()) > 0:
                self._changed.wait(None if left_s == float("inf") else left_s)


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
    guard_wait_s: float = 0.0

    def end(self, error: BaseException | None) -> None:
        """Let everybody who waits for this snapshot go on."""
        for future in (self.enqueued, self.copied):
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)


class Snapshotter:
    """Copies planned states into an arena. One per engine; `take` is called by one thread at a time."""

    def __init__(self, arena: StagingArena, submit_copy: Callable[[Callable[[], None]], Future[None]], *, timeout_s: float) -> None:
        self._arena = arena
        self._submit_copy = submit_copy
        self._timeout_s = timeout_s
        self._cuts: dict[str, tuple[Sequence[int], int, list[ChunkCut]]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._courtesy = _Courtesy()

    def hurry(self) -> None:
        """Start the queued lazy copies now: the caller has nothing more to save, or waits for them. Any thread."""
        self._courtesy.end()

    def planning(self) -> AbstractContextManager[None]:
        """Around everything a `save` does on the caller's thread: lazy copies do not start meanwhile, nor shortly after."""
        return self._courtesy.extended()

    def plan_ahead(self, plan: FilePlan, name: str) -> int:
        """Cut `plan` into chunks before its first `take`; returns the bytes of the chunks it will need."""
        return len(self._cuts_for(plan, name)) * self._arena.chunk_bytes

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
        fill = Fill(state, self._cuts_for(state.plan, name), self._streams, on_copied)
        is_lazy = list(map(guarded.__contains__, state.sources.identities())) if guarded else []
        reserved = self._arena.try_reserve(len(fill.cuts)) if any(is_lazy) or fill.devices else None
        file = _File(fill, write, self._arena, SnapshotJob())
        if reserved is None:
            # Chunks come back only when the copies that hold them have been made.
            self.hurry()
            file.stream_through(self._timeout_s)
        elif any(is_lazy):
            self._take_lazily(file, reserved, is_lazy, guarded)
        else:
            file.copy_all(reserved, fill.record_callers(), None, parallel=True)
        return file.job

    def _take_lazily(self, file: _File, chunks: list[StagingChunk], is_lazy: list[bool], guarded: frozenset[int]) -> None:
        """Copy now what no guard protects, queue the rest for the copy thread."""
        started = time.perf_counter()
        job, chosen = file.job, None if all(is_lazy) else is_lazy
        try:
            callers = file.fill.record_callers()
            if chosen is not None:
                file.fill.copy_chosen(chunks, [not lazy for lazy in chosen], callers)
                file.fill.check_versions(all_but=guarded)
        except BaseException:
            for chunk in chunks:
                self._arena.release(chunk)
            raise
        job.mode, job.copy_s = "lazy", time.perf_counter() - started
        done = self._submit_copy(lambda: self._copy_behind(file, chunks, callers, chosen))
        done.add_done_callback(lambda future: file.give_back_unstarted(chunks, future))

    def _copy_behind(
        self, file: _File, chunks: list[StagingChunk], callers: dict[torch.device, torch.cuda.Event], chosen: list[bool] | None
    ) -> None:
        self._courtesy.wait()
        file.copy_behind(chunks, callers, chosen)

    def _cuts_for(self, plan: FilePlan, name: str) -> list[ChunkCut]:
        known = self._cuts.get(name)
        if known is not None and known[0] is plan.payload_offsets and known[1] == plan.file_bytes:
            return known[2]
        cuts = cut(plan, self._arena.chunk_bytes)
        if len(self._cuts) > 64:
            self._cuts.clear()
        self._cuts[name] = (plan.payload_offsets, plan.file_bytes, cuts)
        return cuts


class _File:
    """One file's chunks on their way from the sources to the writer."""

    def __init__(self, fill: Fill, write: FileWrite, arena: StagingArena, job: SnapshotJob) -> None:
        self.fill = fill
        self.job = job
        self._write = write
        self._arena = arena
        self._last = len(fill.cuts) - 1
        self._has_started = False

    def stream_through(self, timeout_s: float) -> None:
        """Eager, chunk by chunk, as the disk frees them: works for a state of any size."""
        fill, job = self.fill, self.job
        job.mode = "streamed" if len(fill.cuts) > self._arena.num_chunks else "eager"
        callers = fill.record_callers()
        for k in range(len(fill.cuts)):
            before = time.perf_counter()
            chunk = self._arena.acquire(timeout_s)
            try:
                job.backpressure_s += time.perf_counter() - before
                self.copy_all([chunk], callers, None, parallel=True, first=k)
            except BaseException:
                if not self._write.has_taken(fill.cuts[k].offset):
                    self._arena.release(chunk)
                raise

    def copy_all(
        self,
        chunks: list[StagingChunk],
        callers: dict[torch.device, torch.cuda.Event],
        chosen: list[bool] | None,
        *,
        parallel: bool,
        first: int = 0,
    ) -> None:
        """Fill `chunks`, the file's chunks from number `first` on, and hand each to the writer once it is complete.

        Device copies of all of them are queued before the first one is waited for.
        """
        started = time.perf_counter()
        try:
            self.fill.wait_callers(callers)
            queued = []
            for k, chunk in enumerate(chunks, first):
                began = time.perf_counter()
                self.fill.copy_literals(k, chunk)
                queued.append((self.fill.copy(k, chunk, chosen, parallel=parallel), began))
                if not self.fill.devices:
                    self._send(k, chunk, chosen, *queued[-1])
            if self.fill.devices:
                self.job.events.extend(event for events, _ in queued for event in events)
                if first + len(chunks) > self._last:
                    self.job.enqueued.set_result(None)
                for k, chunk in enumerate(chunks, first):
                    self._send(k, chunk, chosen, *queued[k - first])
        except BaseException as error:
            for k, chunk in enumerate(chunks, first):
                if not self._write.has_taken(self.fill.cuts[k].offset):
                    self._arena.release(chunk)
            self.job.end(error)
            raise
        self.job.copy_s += time.perf_counter() - started
        if first + len(chunks) > self._last:
            self.fill.drop_sources()
            self.job.end(None)

    def _send(self, k: int, chunk: StagingChunk, chosen: list[bool] | None, events: list[torch.cuda.Event], began: float) -> None:
        self.fill.wait_devices(events)
        self.fill.report(k, chosen, began)
        if k == self._last:
            self.fill.check_versions()
        piece = self.fill.cuts[k]
        # The writer takes a chunk over in every case, also when it refuses it.
        self._write.submit(Chunk(piece.offset, piece.nbytes, chunk.view, None, lambda: self._arena.release(chunk)))

    def copy_behind(self, chunks: list[StagingChunk], callers: dict[torch.device, torch.cuda.Event], chosen: list[bool] | None) -> None:
        """`copy_all` on the copy thread: a failure is handed to whoever waits for the file."""
        self._has_started = True
        try:
            self.copy_all(chunks, callers, chosen, parallel=False)
        except BaseException as error:  # noqa: BLE001 - it becomes the file's, and so the commit's, first failure
            self._write.abort(error)

    def give_back_unstarted(self, chunks: list[StagingChunk], done: Future[None]) -> None:
        """The copy thread died or was shut down before it ran the job: its waiters must learn it."""
        error = done.exception() if not done.cancelled() else RuntimeError("the copy thread was shut down")
        if error is not None and not self._has_started:
            for chunk in chunks:
                self._arena.release(chunk)
            self.job.end(error)
            self._write.abort(error)
