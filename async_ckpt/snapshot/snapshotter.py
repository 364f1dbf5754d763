"""The copy in RAM: moves a planned state into staging chunks, at once (eager) or behind the next step (lazy).

Guarantees:
- Chunk k of a file holds its bytes [k*C, (k+1)*C); it reaches the writer as soon as those bytes are copied.
- Eager: when `take` returns, every source byte has been copied. Lazy: the same for every storage that is not
  guarded; guarded ones are copied in the background, and `SnapshotJob.copied` says when they are safe to change.
- A tensor that changed before its copy ended fails the checkpoint with `TornSnapshotError`: version counters (its own and those of
  other tensors over the same storage) are compared at the end of the copies, and each filled chunk with the content probes that `take`
  noted when it began.
- Sources are kept alive until their copy has ended; every chunk is handed to the writer or given back.

Which thread: `take` on the caller's thread, with helpers; lazy fills on the writer pool's one copy
thread, in the order of the saves, so a lazy fill never waits for another chunk (its chunks are reserved before it is queued).
Device copies are only queued there; one I/O thread at a time waits for them, file by file.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch

from ..plan.plan import FilePlan, PlannedState
from ..threads.locks import Condition, Lock
from ..writer.chunks import Chunk
from ..writer.file import FileWrite
from ..writer.pool import WriterPool
from .arena import StagingArena, StagingChunk
from .chunk_map import Cuts, cut
from .copy_threads import CopyTeam, num_copy_helpers
from .file_copy import Fill, OnCopied

__all__ = ["SnapshotJob", "Snapshotter", "num_copy_helpers"]

# How long after a save its lazy copy waits for the next one: a checkpoint's files are saved within milliseconds of each other.
_PATIENCE_S = 0.01


class _Courtesy:
    """Lets a caller who is still planning go first: a lazy copy that competes with it for the GIL would be stall."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._planning: set[int] = set()
        """Threads. Not a count: an interrupt may keep one from leaving, until its next save."""
        self._until_s = 0.0

    @contextmanager
    def extended(self) -> Iterator[None]:
        with self._changed:
            self._planning.add(threading.get_ident())
            self._until_s = float("inf")
        try:
            yield
        finally:
            with self._changed:
                self._planning.discard(threading.get_ident())
                if not self._planning and self._until_s:
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


def _nothing() -> None:
    """What an eager snapshot, or one that is over, has to do."""


_Queued = tuple[int, StagingChunk, list[torch.Event], float]
"""A chunk's number, the chunk, what ends its device copies, and when they were queued."""


@dataclass(slots=True)
class SnapshotJob:
    """One file's snapshot. `copied` resolves when no source byte is needed any more."""

    copied: Future[None] = field(default_factory=Future)
    enqueued: Future[None] = field(default_factory=Future)
    """Resolves when all device copies are queued, i.e. when `events` is complete."""
    events: list[torch.Event] = field(default_factory=list)
    accept_changes: Callable[[], None] = _nothing
    """To be called before the sources are changed by streams that wait for `events`: what has not changed by then is not torn."""
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

    def __init__(self, arena: StagingArena, pool: WriterPool, *, timeout_s: float) -> None:
        self._arena = arena
        self._submit_copy = pool.submit_copy
        self._submit_io = pool.submit_io
        self._team = CopyTeam(pool.submit_help, pool.num_helpers, pool.helper_native_ids)
        self._alone = CopyTeam(pool.submit_help, 0)
        self._timeout_s = timeout_s
        self._cuts: dict[str, tuple[Sequence[int], Cuts]] = {}
        self._streams: dict[torch.device, torch.Stream] = {}
        self._courtesy = _Courtesy()
        self._lock = Lock()
        self._unfinished: deque[Callable[[], None]] = deque()
        """What is to be done when the device copies of a file have ended, in the order in which they were queued."""

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
        self,
        state: PlannedState,
        write: FileWrite,
        *,
        guarded: frozenset[int],
        name: str,
        owners: Sequence[torch.Tensor] = (),
        on_copied: OnCopied | None = None,
    ) -> SnapshotJob:
        """Snapshot `state` into chunks and hand them to `write`.

        Blocks for the copy of everything that is not guarded, and for free staging memory (backpressure).

        Args:
            guarded: `UntypedStorage._cdata` of storages that cannot change before the guard's hook has waited.
            owners: tensors that may share storages with those of `state`.
            name: cache key, the file's path inside its tag.
            on_copied: told about each chunk's copy, on the thread that did it.

        Raises:
            TornSnapshotError: tensors changed while they were copied.
            BackpressureTimeout: the disk freed no chunk in time.
            UnsupportedStateError: a storage's device cannot be copied from.
        """
        fill = Fill(state, self._cuts_for(state.plan, name), self._streams, on_copied, owners)
        fill.begin()
        is_lazy = list(map(guarded.__contains__, state.sources.identities())) if guarded else []
        reserved = self._arena.try_reserve(len(fill.cuts))
        file = _File(fill, write, self._arena, self._alone if fill.devices else self._team)
        if reserved is None:
            # Chunks come back only when the copies that hold them have been made.
            self.hurry()
            file.stream_through(self._timeout_s)
        elif any(is_lazy):
            self._take_lazily(file, reserved, is_lazy, guarded)
        else:
            file.copy_all(reserved)
        return file.job

    def _take_lazily(self, file: _File, chunks: list[StagingChunk], is_lazy: list[bool], guarded: frozenset[int]) -> None:
        """Copy now what no guard protects, queue the rest for the copy thread."""
        started = time.perf_counter()
        job, chosen = file.job, None if all(is_lazy) else is_lazy
        try:
            callers = file.fill.record_callers()
            if chosen is not None:
                file.copy_chosen(chunks, [not lazy for lazy in chosen], callers)
                file.fill.check_torn(all_but=guarded)
        except BaseException:
            file.give_back(chunks)
            raise
        job.mode, job.copy_s = "lazy", time.perf_counter() - started
        job.accept_changes = file.fill.accept_changes
        done = self._submit_copy(lambda: self._copy_behind(file, chunks, callers, chosen))
        done.add_done_callback(lambda future: file.give_back_unstarted(chunks, future))

    def _copy_behind(
        self, file: _File, chunks: list[StagingChunk], callers: dict[torch.device, torch.Event], chosen: list[bool] | None
    ) -> None:
        self._courtesy.wait()
        file.copy_behind(chunks, callers, chosen, self._finish_later)

    def _finish_later(self, finish: Callable[[], None]) -> None:
        """Run `finish`, which waits for a device, on an I/O thread: the copy thread queues what is saved next meanwhile."""
        with self._lock:
            self._unfinished.append(finish)
            if len(self._unfinished) > 1:
                return
        try:
            done = self._submit_io(self._finish_all)
        except BaseException:
            with self._lock:
                self._unfinished.clear()
            raise
        # Where no I/O thread is left to do it, it is done here.
        done.add_done_callback(lambda done: None if done.exception() is None else self._finish_all())

    def _finish_all(self) -> None:
        while True:
            self._unfinished[0]()
            with self._lock:
                self._unfinished.popleft()
                if not self._unfinished:
                    return

    def _cuts_for(self, plan: FilePlan, name: str) -> Cuts:
        known = self._cuts.get(name)
        if known is not None and known[0] is plan.payload_offsets and known[1].file_bytes == plan.file_bytes:
            return known[1]
        cuts = cut(plan, self._arena.chunk_bytes)
        if len(self._cuts) > 64:
            self._cuts.clear()
        self._cuts[name] = (plan.payload_offsets, cuts)
        return cuts


class _File:
    """One file's chunks on their way from the sources to the writer."""

    def __init__(self, fill: Fill, write: FileWrite, arena: StagingArena, team: CopyTeam) -> None:
        self.fill = fill
        self.job = SnapshotJob()
        self._write = write
        self._arena = arena
        self._team = team
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
                self.copy_all([chunk], callers, first=k)
            except BaseException:
                if not self._write.has_taken(fill.cuts.offset(k)):
                    self._arena.release(chunk)
                raise

    def copy_all(
        self,
        chunks: list[StagingChunk],
        callers: dict[torch.device, torch.Event] | None = None,
        chosen: list[bool] | None = None,
        *,
        first: int = 0,
        is_urgent: bool = True,
    ) -> None:
        """Fill `chunks`, the file's chunks from number `first` on, and hand each to the writer once it is complete.

        Args:
            callers: where the callers' streams are; None: now.
        """
        started = time.perf_counter()
        try:
            callers = self.fill.record_callers() if callers is None else callers
            if not is_urgent:
                self.fill.find_again()
            if self.fill.devices:
                self._copy_from_devices(chunks, callers, chosen, first)
            elif is_urgent:
                self._copy_urgently(chunks, first)
            else:
                for k, chunk in enumerate(chunks, first):
                    self._fill_on_cpu(k, chunk, chosen)
                    self._send(k, chunk)
        except BaseException as error:
            self.give_back(chunks, first)
            self.job.end(error)
            raise
        self.job.copy_s += time.perf_counter() - started
        if first + len(chunks) > self._last:
            self._end()

    def _end(self) -> None:
        self.job.end(None)
        self.fill.drop_sources()

    def give_back(self, chunks: list[StagingChunk], first: int = 0) -> None:
        """Those that the writer has not taken over, once no device writes to them."""
        self.fill.finish_device_copies()
        for k, chunk in enumerate(chunks, first):
            if not self._write.has_taken(self.fill.cuts.offset(k)):
                self._arena.release(chunk)

    def copy_chosen(self, chunks: list[StagingChunk], chosen: list[bool], callers: dict[torch.device, torch.Event]) -> None:
        """Copy the chosen parts of every chunk, on the caller's thread; returns when they are copied."""
        if not self.fill.devices:
            self._share(chunks, lambda k, chunk: self._fill_on_cpu(k, chunk, chosen, is_urgent=True, literals=False), lambda i: None)
            return
        self.fill.wait_callers(callers)
        queued = []
        for k, chunk in enumerate(chunks):
            began = time.perf_counter()
            queued.append((k, self.fill.copy(k, chunk, chosen, literals=False), began))
        for k, events, began in queued:
            self.fill.wait_devices(events)
            self.fill.report(k, chosen, began)

    def _copy_urgently(self, chunks: list[StagingChunk], first: int) -> None:
        # CRC and writes on the cores that copy would make the caller wait for them.
        sends_early = self._team.leaves_cores(len(chunks))
        self._share(
            chunks,
            lambda i, chunk: self._fill_on_cpu(first + i, chunk, None, is_urgent=True),
            lambda i: self._send(first + i, chunks[i]) if sends_early else None,
        )
        if not sends_early:
            self._send(first, *chunks)

    def _share(self, chunks: list[StagingChunk], fill: Callable[[int, StagingChunk], None], on_ended: Callable[[int], None]) -> None:
        """Run `fill(i, chunks[i])` for all of them, on the caller's thread and its helpers."""

        def help_with(i: int) -> None:
            # The caller may be interrupted, and give the chunks up, while a helper still writes to one.
            if self._arena.begin_use(chunks[i]):
                try:
                    fill(i, chunks[i])
                finally:
                    self._arena.end_use(chunks[i])

        self._team.run(len(chunks), lambda i: fill(i, chunks[i]), help_with, on_ended)

    def _fill_on_cpu(
        self, k: int, chunk: StagingChunk, chosen: list[bool] | None, *, is_urgent: bool = False, literals: bool = True
    ) -> None:
        began = time.perf_counter()
        self.fill.copy(k, chunk, chosen, literals=literals, is_urgent=is_urgent)
        if literals:
            # With them the chunk is complete.
            self.fill.compare_probes(k, chunk)
        self.fill.report(k, chosen, began)

    def _copy_from_devices(
        self, chunks: list[StagingChunk], callers: dict[torch.device, torch.Event], chosen: list[bool] | None, first: int
    ) -> None:
        self._finish_device_copies(self._queue_device_copies(chunks, callers, chosen, first), chosen)

    def _queue_device_copies(
        self, chunks: list[StagingChunk], callers: dict[torch.device, torch.Event], chosen: list[bool] | None, first: int
    ) -> list[_Queued]:
        """Queue the copies of all chunks before the first one is waited for."""
        self.fill.wait_callers(callers)
        queued = []
        for k, chunk in enumerate(chunks, first):
            began = time.perf_counter()
            queued.append((k, chunk, self.fill.copy(k, chunk, chosen), began))
        self.job.events.extend(event for _, _, events, _ in queued for event in events)
        if first + len(chunks) > self._last:
            self.job.enqueued.set_result(None)
        return queued

    def _finish_device_copies(self, queued: list[_Queued], chosen: list[bool] | None) -> None:
        for k, chunk, events, began in queued:
            self.fill.wait_devices(events)
            self.fill.compare_probes(k, chunk)
            self.fill.report(k, chosen, began)
            self._send(k, chunk)

    def _send(self, first: int, *chunks: StagingChunk) -> None:
        """Hand over the chunks from number `first` on."""
        if first + len(chunks) > self._last:
            self.fill.check_torn()
        # The writer takes chunks over in every case, also when it refuses them.
        self._write.submit(*(self._handed_over(k, chunk) for k, chunk in enumerate(chunks, first)))

    def _handed_over(self, k: int, chunk: StagingChunk) -> Chunk:
        return Chunk(self.fill.cuts.offset(k), self.fill.cuts.nbytes(k), chunk.view, lambda: self._arena.release(chunk))

    def copy_behind(
        self,
        chunks: list[StagingChunk],
        callers: dict[torch.device, torch.Event],
        chosen: list[bool] | None,
        finish_later: Callable[[Callable[[], None]], None],
    ) -> None:
        """`copy_all` on the copy thread. Device copies are only queued here; what waits for them is given to `finish_later`."""
        self._has_started = True
        started = time.perf_counter()

        def finish(queued: list[_Queued]) -> None:
            self._finish_device_copies(queued, chosen)
            self.job.copy_s += time.perf_counter() - started
            self._end()

        def queue() -> None:
            self.fill.find_again()
            queued = self._queue_device_copies(chunks, callers, chosen, 0)
            finish_later(lambda: self._hand_on_failure(chunks, lambda: finish(queued)))

        def copy() -> None:
            self.copy_all(chunks, callers, chosen, is_urgent=False)

        self._hand_on_failure(chunks, queue if self.fill.devices else copy)

    def _hand_on_failure(self, chunks: list[StagingChunk], work: Callable[[], None]) -> None:
        """Do `work`; a failure is handed to whoever waits for the file."""
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it becomes the file's, and so the commit's, first failure
            self.give_back(chunks)
            self.job.end(error)
            self._write.abort(error)

    def give_back_unstarted(self, chunks: list[StagingChunk], done: Future[None]) -> None:
        """The copy thread died or was shut down before it ran the job: its waiters must learn it."""
        error = done.exception() if not done.cancelled() else RuntimeError("the copy thread was shut down")
        if error is not None and not self._has_started:
            for chunk in chunks:
                self._arena.release(chunk)
            self.job.end(error)
            self._write.abort(error)
