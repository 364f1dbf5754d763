"""The copy in RAM: moves planned states into staging chunks, at once (eager) or behind the next step (lazy).

Guarantees:
- Eager: when `take` returns, every source byte has been copied. Lazy: the same for every storage that is not guarded;
  guarded ones are copied in the background, and `FileCopy.copied` says when they are safe to change.
- Chunks of a lazy copy are reserved before it is queued, so that it never waits for another one.

Which thread: `take` on the caller's thread, with helpers; lazy copies on the one copy thread, in the order of the
saves. Device copies are only queued there; one I/O thread at a time waits for them, file by file.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..errors import CheckpointError
from ..plan.plan import FilePlan, PlannedState
from ..threads.executor import DaemonExecutor
from ..threads.locks import Lock
from ..threads.outcome import Outcome
from .arena import StagingArena
from .chunk_map import ChunkMap, map_chunks
from .copy_threads import CopyTeam
from .file_copy import ChunkSink, FileCopy, OnCopied
from .owned_storages import NOTHING, Owned
from .payloads import SideStreams
from .probes import is_probed

# How long after a save its lazy copy waits for the next one: a checkpoint's files are saved within milliseconds.
_PATIENCE_S = 0.01
# A save may be interrupted by a signal handler that waits for that copy.
_MAX_PATIENCE_S = 1.0
_MAX_MAPS = 64


class Snapshotter:
    """Copies planned states into an arena. One per engine; `take` is called by one thread at a time.

    Args:
        copier: one thread, for what is copied behind the caller.
        helpers: for what the caller waits for.
        io: threads that may wait for devices.
        let_go: has a file that is written give back memory that it only keeps; False where there is none.
    """

    def __init__(
        self,
        arena: StagingArena,
        copier: DaemonExecutor,
        helpers: DaemonExecutor,
        io: DaemonExecutor,
        let_go: Callable[[], bool],
        timeout_s: float,
    ) -> None:
        self._arena = arena
        self._copier, self._io, self._let_go = copier, io, let_go
        self._team = CopyTeam(helpers)
        self._timeout_s = timeout_s
        self._maps: dict[tuple[str, tuple[int, int] | None], tuple[Sequence[int], ChunkMap]] = {}
        self._streams = SideStreams()
        self._lock = Lock()
        """Of the threads that copy, not of those that save."""
        self._changed: Outcome[None] = Outcome()
        """Resolves when the fields below have changed; then there is a new one."""
        self._saving: set[int] = set()
        """Threads that lazy copies are deferred for. Not a count: an interrupt may keep one from leaving, until its
        next save."""
        self._deferred_until_s = 0.0
        self._unfinished: deque[Callable[[], None]] = deque()
        """What is to be done when the device copies of a file have ended, in the order in which they were queued."""

    @contextmanager
    def deferring(self) -> Iterator[None]:
        """Around all that a `save` does on its thread: a lazy copy that competes with it for the GIL would be stall.
        None starts meanwhile, nor shortly after: the next file may be saved at once."""
        self._saving.add(threading.get_ident())
        self._deferred_until_s = float("inf")
        try:
            yield
        finally:
            self._saving.discard(threading.get_ident())
            if not self._saving and self._deferred_until_s:
                self.start_at(time.monotonic() + _PATIENCE_S)

    def start_at(self, at_s: float = 0.0) -> None:
        """Start the deferred copies at `at_s`, or now: the caller has nothing more to save, or waits for them. Any
        thread."""
        self._deferred_until_s = at_s
        changed, self._changed = self._changed, Outcome()
        changed.resolve(None, None)

    def plan_ahead(self, plan: FilePlan, name: str) -> int:
        """Cut `plan` into chunks before its first `take`; returns the bytes of the chunks it will need."""
        return len(self._map_of(plan, name).offsets) * self._arena.chunk_bytes

    def take(
        self,
        state: PlannedState,
        sink: ChunkSink,
        *,
        name: str,
        guarded: Owned = NOTHING,
        on_copied: OnCopied | None = None,
        elsewhere: frozenset[int] = frozenset(),
        chunks_of: tuple[int, int] | None = None,
    ) -> FileCopy:
        """Snapshot `state` into chunks and hand them to `sink`.

        Blocks for the copy of everything that is not guarded, and for free staging memory (backpressure).

        Args:
            name: cache key, the file's path inside its tag.
            guarded: what cannot change before the guard has waited for the copy.
            on_copied: told about each chunk's copy, on the thread that did it.
            elsewhere: chunks whose bytes `sink` has already: they are not copied.
            chunks_of: the range of the file's bytes that is snapshotted, if not all.

        Raises:
            TornSnapshotError: tensors changed while they were copied.
            BackpressureTimeout: the disk freed no chunk in time.
            UnsupportedStateError: a storage's device cannot be copied from.
        """
        chunk_map = self._map_of(state.plan, name, chunks_of)
        file = FileCopy(state, chunk_map, sink, self._arena, self._streams, guarded.tensors, on_copied, elsewhere)
        chunks = self._arena.try_reserve(len(chunk_map.offsets))
        while chunks is None and self._let_go():
            chunks = self._arena.try_reserve(len(chunk_map.offsets))
        if chunks is None:
            # Chunks come back only when the copies that hold them have been made.
            self.start_at()
            file.stream_through(self._team, self._timeout_s)
            return file
        if guarded is NOTHING:
            file.copy_now(chunks, self._team)
            return file
        unprobed = [
            k
            for k, layout in state.plan.strided.items()
            if not is_probed(layout) and state.storages[k].device.type == "cpu"
        ]
        is_lazy: list[bool] | None = None
        if unprobed or not guarded.covers:
            is_lazy = list(map(guarded.ids.__contains__, state.storage_ids))
            # What no probe can compare behind the caller is copied while nobody else has its turn.
            for k in unprobed:
                is_lazy[k] = False
        file.copy_unguarded(chunks, self._team, is_lazy, guarded.ids)
        self._copier.submit(lambda: self._copy_behind(file)).add_done_callback(file.give_up_unstarted)
        return file

    def _copy_behind(self, file: FileCopy) -> None:
        latest_s = time.monotonic() + _MAX_PATIENCE_S
        while True:
            changed, left_s = self._changed, min(latest_s, self._deferred_until_s) - time.monotonic()
            if left_s <= 0:
                break
            changed.wait(left_s)
        file.copy_behind()
        if not file.copied.done():
            self._finish_later(file.finish_behind)

    def _finish_later(self, finish: Callable[[], None]) -> None:
        """Run `finish`, which waits for a device, on an I/O thread: the copy thread queues what is saved next
        meanwhile."""
        with self._lock:
            self._unfinished.append(finish)
            if len(self._unfinished) > 1:
                return
        # Where no I/O thread is left to do it, it is done here.
        try:
            done = self._io.submit(self._finish_all)
        except CheckpointError:
            self._finish_all()
        else:
            done.add_done_callback(lambda done: None if done.exception() is None else self._finish_all())

    def _finish_all(self) -> None:
        while True:
            self._unfinished[0]()
            with self._lock:
                self._unfinished.popleft()
                if not self._unfinished:
                    return

    def _map_of(self, plan: FilePlan, name: str, chunks_of: tuple[int, int] | None = None) -> ChunkMap:
        known = self._maps.get((name, chunks_of))
        if known is not None and known[0] is plan.payload_offsets and known[1].file_bytes == plan.file_bytes:
            return known[1]
        chunk_map, chunk_bytes = map_chunks(plan, self._arena.chunk_bytes), self._arena.chunk_bytes
        if chunks_of is not None:
            chunk_map = chunk_map.part(slice(chunks_of[0] // chunk_bytes, -(-chunks_of[1] // chunk_bytes)))
        if len(self._maps) > _MAX_MAPS:
            self._maps.clear()
        self._maps[name, chunks_of] = (plan.payload_offsets, chunk_map)
        return chunk_map
