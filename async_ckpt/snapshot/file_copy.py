"""One file's snapshot: its bytes on their way from the user's tensors into staging chunks, and on to the writer.

Guarantees:
- Chunk k of the file holds its bytes [k*C, (k+1)*C); it reaches the sink as soon as those bytes are copied.
- Sources are kept alive until their copy has ended; every chunk is handed to the sink or given back.
- A tensor that changed before its copy ended is a `TornSnapshotError`, raised to the caller or given to the sink.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from operator import and_
from typing import Protocol

import torch

from ..errors import TransactionStateError
from ..format.chunk import Chunk
from ..host.device import record_now, synchronize
from ..plan.plan import PlannedState
from .arena import StagingArena, StagingChunk
from .changes import TornCheck
from .chunk_map import ChunkMap, LargePiece
from .copy_threads import CopyTeam
from .payloads import Payloads, SideStreams

OnCopied = Callable[[str, float, int, int], None]
"""Called with (kind "copy" or "d2h", start on ``time.perf_counter``, file offset, bytes) when a chunk's copy has
ended."""

_QueuedChunk = tuple[int, StagingChunk, list[torch.Event], float]
"""A chunk's number, the chunk, what ends its device copies, and when they were queued."""


class ChunkSink(Protocol):
    """Where the chunks of a file go, from the first to the last. Any thread; never blocks."""

    def submit(self, *chunks: Chunk) -> None:
        """Take over the next chunks in every case, also when it raises: each is released exactly once."""

    def has_taken(self, offset: int) -> bool:
        """Whether the chunk at `offset` was taken over."""

    def abort(self, error: BaseException) -> None:
        """Give the file up because of `error`."""


class FileCopy:
    """The copy of one planned state; takes and raises what `Snapshotter.take` does. Made and begun by the thread that
    saves; the copy thread may end it."""

    def __init__(
        self,
        state: PlannedState,
        chunk_map: ChunkMap,
        sink: ChunkSink,
        arena: StagingArena,
        streams: SideStreams,
        owners: Sequence[torch.Tensor],
        on_copied: OnCopied | None,
        elsewhere: frozenset[int],
    ) -> None:
        self._elsewhere = elsewhere
        self.has_begun = False
        """Whether the copy thread copies what it was left, or has done so."""
        self.copied: Future[None] = Future()
        """Resolves when no source byte is needed any more."""
        self.queued: Future[None] = Future()
        """Resolves when all device copies are queued, i.e. when `events` is complete."""
        self.events: list[torch.Event] = []
        self.mode = "eager"
        self.backpressure_s = 0.0
        self.copy_s = 0.0
        self.guard_wait_s = 0.0
        self._payloads = Payloads(state, chunk_map)
        self._devices = self._payloads.devices
        self._map = chunk_map
        self._sink = sink
        self._arena = arena
        self._streams = streams
        self._on_copied = on_copied
        self._is_scarce = False
        self._wanted: list[bool] | None = None
        """Of payloads and literals, those that are being copied; None: all of them."""
        self._completes = True
        """Whether chunks are complete when those are copied."""
        self._unfinished: list[_QueuedChunk] = []
        self._callers = {device: record_now(device) for device in self._devices}
        """How far the caller's streams have come: from there on the sources are final."""
        payloads = self._payloads
        self._torn = TornCheck(state, owners, chunk_map.probes, payloads.addresses, frozenset(payloads.on_devices))
        self._chunks: list[StagingChunk] = []
        """All of them, where the copy thread ends the copy."""

    # On the thread that saves.

    def copy_now(self, chunks: list[StagingChunk], team: CopyTeam, first: int = 0) -> None:
        """Fill `chunks`, the file's chunks from number `first` on, and hand them to the sink. Blocks for the copy."""
        started = time.perf_counter()
        # CRC and writes on the cores that copy would make the caller wait for them.
        sends_early = team.leaves_cores(len(chunks))
        try:
            self._fill_all(chunks, team, first, sends_early=sends_early)
            if not sends_early and not self._devices:
                self._send(first, *chunks)
        except BaseException as error:
            self._fail(chunks, error, first)
            raise
        self.copy_s += time.perf_counter() - started
        if first + len(chunks) == len(self._map.offsets):
            self._end()

    def stream_through(self, team: CopyTeam, timeout_s: float) -> None:
        """`copy_now` chunk by chunk, as the disk frees them: works for a state of any size. Raises BackpressureTimeout:
        none became free within `timeout_s`."""
        self._is_scarce = True
        self.mode = "streamed" if len(self._map.offsets) > self._arena.num_chunks else "eager"
        for k in range(len(self._map.offsets)):
            before = time.perf_counter()
            chunk = self._arena.acquire(timeout_s)
            try:
                self.backpressure_s += time.perf_counter() - before
                self.copy_now([chunk], team, k)
            except BaseException:
                self._give_back([chunk], k)
                raise

    def copy_unguarded(
        self, chunks: list[StagingChunk], team: CopyTeam, is_lazy: list[bool] | None, guarded: frozenset[int]
    ) -> None:
        """Copy what may change at any time, and leave the payloads that are lazy (None: all), which lie in the storages
        `guarded`, for `copy_behind`."""
        started, self._chunks = time.perf_counter(), chunks
        try:
            if is_lazy is not None:
                num_literals = len(self._payloads) - len(is_lazy)
                self._wanted, self._completes = (
                    [*(not lazy for lazy in is_lazy), *repeat(False, num_literals)],
                    False,
                )
                self._fill_all(chunks, team, 0, sends_early=False)
                self._torn.check_torn(all_but=guarded)
                self._wanted, self._completes = [*is_lazy, *repeat(True, num_literals)], True
        except BaseException as error:
            self._fail(chunks, error)
            raise
        self.mode, self.copy_s = "lazy", time.perf_counter() - started

    # Behind the caller.

    def copy_behind(self) -> None:
        """Copy what `copy_unguarded` has left, on the copy thread; from devices, `finish_behind` has to end it. A
        failure is the sink's."""
        self.has_begun, self._began_s = True, time.perf_counter()
        with self._handing_on_failures():
            # The user may have moved the bytes.
            self._payloads.look_again(self._wanted)
            self._payloads.prepare(self._torn.copies())
            if self._devices:
                self._queue_device_copies(self._chunks)
                return
            for k, chunk in enumerate(self._chunks):
                self._fill_on_cpu(k, chunk, is_urgent=False)
                self._send(k, chunk)
            self._end_behind()

    def finish_behind(self) -> None:
        """Wait for the copies that `copy_behind` has queued, and hand the chunks over. One thread; nothing where that
        failed."""
        if not self.copied.done():
            with self._handing_on_failures():
                self._finish_device_copies()
                self._end_behind()

    def give_up_unstarted(self, done: Future[None]) -> None:
        """The copy thread died or was shut down before it ran the copy: whoever waits for it must learn that."""
        error = done.exception() if not done.cancelled() else TransactionStateError("the copy thread was shut down")
        if error is not None and not self.has_begun:
            with self._handing_on_failures():
                raise error

    def _end_behind(self) -> None:
        self.copy_s += time.perf_counter() - self._began_s
        self._end()
        # On this thread: the next save lets go of this object within its stall.
        del self._payloads

    @contextmanager
    def _handing_on_failures(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:  # noqa: BLE001 - it becomes the file's, and so the commit's, first failure
            self._fail(self._chunks, error)
            self._sink.abort(error)

    # Any thread.

    def accept_changes(self) -> None:
        """To be called before sources change on streams that wait for `events`: what has not changed by then is not
        torn."""
        self._torn.accept_changes()

    # Inside: the ends.

    def _fail(self, chunks: list[StagingChunk], error: BaseException, first: int = 0) -> None:
        """Give up: chunks go back, and whoever waits learns `error`."""
        self._give_back(chunks, first)
        self._end(error)

    def _end(self, error: BaseException | None = None) -> None:
        """Let everybody who waits go on, and let go of the sources."""
        for future in (self.queued, self.copied):
            if not future.done():
                future.set_result(None) if error is None else future.set_exception(error)
        self._torn.drop()
        self._payloads.storages, self._chunks = (), []

    def _give_back(self, chunks: list[StagingChunk], first: int) -> None:
        """Those that the sink has not taken over, once no device writes to them."""
        self._streams.finish(self._devices)
        for k, chunk in enumerate(chunks, first):
            if not self._sink.has_taken(self._map.offsets[k]):
                self._arena.release(chunk)

    def _send(self, first: int, *chunks: StagingChunk) -> None:
        """Hand over the chunks from number `first` on."""
        if first + len(chunks) == len(self._map.offsets):
            self._torn.check_torn()
        # They are taken over in every case, also when they are refused.
        numbers = slice(first, first + len(chunks))
        releases = [partial(self._arena.release, chunk) for chunk in chunks]
        views = [chunk.view for chunk in chunks]
        extents = self._map.offsets[numbers], self._map.nbytes[numbers]
        elsewhere = [k in self._elsewhere for k in range(first, first + len(chunks))]
        self._sink.submit(*map(Chunk, *extents, views, releases, elsewhere, repeat(self._is_scarce)))

    def _report(self, on_copied: OnCopied, k: int, began: float) -> None:
        """Tell the observers that the wanted parts of chunk `k` are copied."""
        num_bytes = self._map.nbytes[k]
        if self._wanted is not None:
            num_bytes = sum(piece.nbytes for piece in self._map.payload_pieces(k) if self._wanted[piece.source])
        if num_bytes:
            on_copied("d2h" if self._devices else "copy", began, self._map.offsets[k], num_bytes)

    # Inside: copying.

    def _fill_all(self, chunks: list[StagingChunk], team: CopyTeam, first: int, *, sends_early: bool) -> None:
        """Fill all of them, on the caller's thread and its helpers; those with bytes on devices are handed over too."""
        self._payloads.prepare(self._torn.copies())
        if self._devices:
            self._queue_device_copies(chunks, first)
            self._finish_device_copies()
            return
        if self._arena.is_entered:
            # In a signal handler that has interrupted a call of the arena: helpers would wait for that call, and it for
            # them.
            for i, chunk in enumerate(chunks):
                self._fill_on_cpu(first + i, chunk, is_urgent=True)
                if sends_early:
                    self._send(first + i, chunk)
            return

        def help_with(i: int, _kept: object = self._payloads.storages) -> None:
            # The caller may be interrupted, and give up chunks and sources, while a helper still copies.
            with self._arena.using(chunks[i]) as is_held:
                if is_held:
                    self._fill_on_cpu(first + i, chunks[i], is_urgent=True)

        team.run(
            len(chunks),
            lambda i: self._fill_on_cpu(first + i, chunks[i], is_urgent=True),
            help_with,
            lambda i: self._send(first + i, chunks[i]) if sends_early else None,
        )

    def _fill_on_cpu(self, k: int, chunk: StagingChunk, *, is_urgent: bool) -> None:
        if k in self._elsewhere:
            return
        began = time.perf_counter()
        self._payloads.fill(k, chunk, self._wanted, completes=self._completes, is_urgent=is_urgent)
        if self._completes:
            self._torn.compare_chunk(k, chunk.tensor)
        if self._on_copied is not None:
            self._report(self._on_copied, k, began)

    def _queue_device_copies(self, chunks: list[StagingChunk], first: int = 0) -> None:
        """Queue the copies of all chunks before the first one is waited for."""
        self._streams.order_behind(self._callers)
        on_devices = self._payloads.on_devices
        on_host = [k not in on_devices for k in range(len(self._payloads))]
        wanted = on_host if self._wanted is None else list(map(and_, on_host, self._wanted))
        for k, chunk in enumerate(chunks, first):
            began = time.perf_counter()
            by_device: dict[torch.device, list[LargePiece]] = {}
            if k not in self._elsewhere:
                self._payloads.fill(k, chunk, wanted, completes=self._completes, is_urgent=False)
                for piece in self._map.payload_pieces(k):
                    if piece.source in on_devices and (self._wanted is None or self._wanted[piece.source]):
                        by_device.setdefault(on_devices[piece.source], []).append(piece)
            events = [self._queue_copies(device, pieces, chunk) for device, pieces in by_device.items()]
            self._unfinished.append((k, chunk, events, began))
        self.events.extend(event for _, _, events, _ in self._unfinished for event in events)
        if self._completes and first + len(chunks) == len(self._map.offsets):
            self.queued.set_result(None)

    def _queue_copies(self, device: torch.device, pieces: list[LargePiece], chunk: StagingChunk) -> torch.Event:
        copies = (
            (
                *self._payloads.read(piece.source, piece.source_offset, piece.nbytes),
                chunk.tensor[piece.chunk_offset :][: piece.nbytes],
            )
            for piece in pieces
        )
        return self._streams.queue(device, copies)

    def _finish_device_copies(self) -> None:
        queued, self._unfinished = self._unfinished, []
        for k, chunk, events, began in queued:
            synchronize(events)
            if self._on_copied is not None and k not in self._elsewhere:
                self._report(self._on_copied, k, began)
            if self._completes:
                if k not in self._elsewhere:
                    self._torn.compare_chunk(k, chunk.tensor)
                self._send(k, chunk)
