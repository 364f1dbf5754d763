"""What an engine has running: planner, staging memory, snapshotter, guard and writer pool, and the user's own code.

Nothing here refers to the engine that uses it: what is dropped without `close` can still be finished.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from typing import Any

from ..errors import ConfigError, TransactionStateError, WriteError, report
from ..host.device import pinning
from ..metrics import Observer, Span
from ..plan.planner import Planner
from ..ranks.coordinator import Coordinator
from ..snapshot.arena import StagingArena
from ..snapshot.copy_threads import num_copy_helpers
from ..snapshot.guard import Guard
from ..snapshot.snapshotter import Snapshotter
from ..storage.filesystem import COHERENT_TYPES, FileSystem
from ..threads.executor import DaemonExecutor
from ..threads.outcome import run_guarded
from ..writer.disk import MakeRoom
from ..writer.pool import WriterPool
from .config import EngineConfig
from .reuse import Reuse

# Of an automatic staging size, which may be far above what is saved; `guard` and `prewarm` add what they know of.
_AUTO_WARM_BYTES = 256 << 20
# Warming ahead ends at the next chunk; nothing of it waits for the disk.
_WARMUP_END_S = 10.0
# Of spans: an observer that is this far behind hears of checkpoints, and no more of chunks.
_MAX_BEHIND = 10_000


class Callbacks:
    """Runs the user's code, observers and done-callbacks, on one thread that nothing else waits for, in the order of
    the events. Any thread; only `close` blocks; nothing raises.

    Whatever that code does (raise anything, block, call the engine), it harms no checkpoint: no lock of ours is held
    around it. A broken observer is left out after one warning. Raises RuntimeError: the thread could not be started.
    """

    def __init__(self, observers: Iterable[Observer], name: str) -> None:
        self._observers = list(observers)
        self._thread = DaemonExecutor(name, 1)

    def run(self, call: Callable[[], object]) -> None:
        """Run `call` on the thread, after everything before it; here and now once the thread has ended."""
        try:
            self._thread.submit(run_guarded, call)
        except TransactionStateError:
            run_guarded(call)

    def report(self, level: int, message: str, *args: object) -> None:
        """Log on the thread: log handlers are the user's code too."""
        self.run(lambda: report(level, message, *args))

    def on_span(self, span: Span) -> None:
        if self._thread.num_queued < _MAX_BEHIND:
            self.tell("on_span", span)

    def tell_span(
        self, kind: str, start_s: float, tag: str, path: str = "", offset: int = 0, num_bytes: int = 0
    ) -> None:
        """Tell about a piece of work that ended now, on this thread."""
        thread = threading.current_thread().name
        self.on_span(Span(kind, start_s, time.perf_counter(), thread, tag, path, offset, num_bytes))

    def tell(self, event: str, *about: object) -> None:
        """Call this method of each observer; one that does not derive from `Observer` may not have all of them."""
        if self._observers:
            self.run(lambda: self._tell_now(event, *about))

    def close(self, timeout_s: float) -> None:
        """Let what is queued run, for `timeout_s` seconds at most; it goes on after that."""
        self._thread.shutdown(wait=False)
        if not self._thread.join(timeout_s):
            report(
                logging.WARNING,
                "a callback or observer did not end within %.1f s and goes on; no checkpoint waits for it",
                timeout_s,
            )

    def _tell_now(self, event: str, *about: object) -> None:
        for observer in tuple(self._observers):
            try:
                getattr(observer, event, lambda *_: None)(*about)
            except BaseException as error:  # noqa: BLE001 - foreign code: whatever it raises must not fail a checkpoint
                self._observers.remove(observer)
                told = "observer %r raised %r and is left out from now on"
                report(logging.WARNING, told, observer, error, warning=RuntimeWarning)


class SavePipeline:
    """From a state to chunks on the disk. Plans and snapshots by one thread at a time, everything else from any.
    `name`: prefix of the threads' names. `make_room`: as a `WriterPool` takes it.

    Raises ConfigError: more staging memory than there is. WriteError: no more threads or descriptors. Nothing is left
    behind.
    """

    def __init__(
        self,
        config: EngineConfig,
        filesystem: FileSystem,
        *,
        name: str = "async-ckpt",
        min_chunks: int = 1,
        make_room: MakeRoom | None = None,
    ) -> None:
        # Memory first: what fails from here on must not leave threads behind.
        self.arena = arena = _arena(config, min_chunks)
        self.config, self.filesystem, self._root = config, filesystem, os.path.abspath(config.root)
        self.reuse = Reuse(is_on=config.reuse == "auto", frozen=config.reuse_frozen)
        self.observes = bool(config.observers)
        """Whether anybody hears of spans."""
        self._has_stopped = self._has_told_of_replicas = False
        self.notes: deque[str] = deque()
        """What plans want the user to be warned of, by the next call that may: see `tell`."""
        self.warming: list[Future[None]] = []
        with contextlib.ExitStack() as undo:
            try:
                self.callbacks = Callbacks(config.observers, f"{name}-callbacks")
                undo.callback(self.callbacks.close, 0.0)
                self.pool = WriterPool(
                    filesystem,
                    num_writers=config.num_writers,
                    num_helpers=num_copy_helpers(),
                    io_mode=config.io_mode,
                    rewrite=config.rewrite,
                    make_room=make_room,
                    on_span=self.callbacks.on_span if self.observes else None,
                    name=name,
                )
                undo.pop_all()
            except (OSError, RuntimeError, MemoryError) as error:
                # RuntimeError: Python could not start a thread.
                raise WriteError(
                    f"the writer's threads cannot be started ({error}); nothing was written, no thread is left behind: "
                    "lower num_writers, or raise the limits of this process (ulimit -u, -n, -v)",
                    errno=(error.errno if isinstance(error, OSError) else None) or errno.EAGAIN,
                    path=os.fspath(config.root),
                ) from error
        self.pool.death.when_done(lambda death: arena.poison(death.failure() or TransactionStateError("died")))
        self.planner = Planner(
            alignment=config.storage_alignment,
            compact_views=config.compact_views,
            format=config.format,
            tell=self.notes.append,
        )
        pool, timeout_s = self.pool, config.backpressure_timeout_s
        self.snapshotter = Snapshotter(arena, pool.copier, pool.helpers, pool.disk.io, pool.let_go, timeout_s)
        self.guard = Guard(timeout_s, self.snapshotter.start_at)
        is_auto = config.staging_bytes == "auto"
        self._num_warm_bytes = _AUTO_WARM_BYTES if is_auto else arena.num_chunks * arena.chunk_bytes

    def num_writers_of(self, coordinator: Coordinator) -> int:
        """How many ranks write one file together in the root, which was looked at before. Warns once where that is one,
        because more are not known to be able to.
        """
        kind = self.filesystem.root_types.get(self._root, "")
        if kind in COHERENT_TYPES:
            return coordinator.num_sharing
        if coordinator.leads and not self._has_told_of_replicas:
            self._has_told_of_replicas = True
            told = "root %r: %s is not known to let several processes write one file, so rank 0 writes replicated ones"
            report(logging.WARNING, told, self._root, kind or "a file system without a name")
        return 1

    # Warming: what a first save would otherwise pay for.

    def warm(self, more_bytes: int | None = None) -> None:
        """Fault in more staging memory (None: what the configuration asks for) in the background. Warns of a failure:
        saves are slower then."""
        # A closure over the arena alone: the background thread must not keep an engine alive.
        arena = self.arena
        target_bytes = (
            self._num_warm_bytes if more_bytes is None else arena.num_faulted * arena.chunk_bytes + more_bytes
        )
        job = self.pool.submit_io(lambda: arena.fault_in(target_bytes))
        job.add_done_callback(_warn_of_failure)
        self.warming = [*(other for other in self.warming if not other.done()), job]

    def plan_ahead(self, states: Mapping[str, Any]) -> tuple[int, int]:
        """Plan `states`, by path inside a tag; returns the staging bytes they will need, and their files' bytes."""
        plans = {name: self.planner.plan(state, name=name).plan for name, state in states.items()}
        staging_bytes = sum(self.snapshotter.plan_ahead(plan, name) for name, plan in plans.items())
        return staging_bytes, sum(plan.file_bytes for plan in plans.values())

    def fault_in(self, num_bytes: int | None) -> None:
        """Block until `num_bytes` (None: all) of the staging memory are warm."""
        size_bytes = self.arena.num_chunks * self.arena.chunk_bytes
        self.arena.fault_in(size_bytes if num_bytes is None else min(size_bytes, num_bytes))

    # Ending.

    def stop(self, timeout_s: float) -> None:
        """End all threads and give the memory back; goes on where an interrupt has cut it short. Raises
        BackpressureTimeout: the disk did not end in time."""
        if self._has_stopped:
            return
        deadline_s = time.monotonic() + timeout_s
        self.arena.poison(TransactionStateError("the engine is closed"))
        # A thread that is inside torch when the interpreter ends takes the process down with it.
        wait(self.warming, _WARMUP_END_S)
        self.pool.close(timeout_s)
        self.guard.remove()
        self.arena.close()
        self.callbacks.close(max(0.1, deadline_s - time.monotonic()))
        self._has_stopped = True


def _arena(config: EngineConfig, min_chunks: int) -> StagingArena:
    chunk_bytes = config.resolved_chunk_bytes()
    num_chunks = max(min_chunks, config.resolved_staging_bytes() // chunk_bytes)
    try:
        return StagingArena(num_chunks, chunk_bytes, pinning=pinning(config.pin_memory))
    except (OSError, MemoryError) as error:
        raise ConfigError(
            f"staging_bytes: the system refuses {num_chunks * chunk_bytes} bytes of memory ({error}); give "
            "less. Nothing was made"
        ) from error


def tell(notes: deque[str]) -> None:
    """Warn of what plans have noted. With no lock held: what shows warnings is the user's code."""
    while notes:
        report(logging.WARNING, "%s", notes.popleft(), warning=RuntimeWarning, stacklevel=3)


def _warn_of_failure(done: Future[None]) -> None:
    if not done.cancelled() and done.exception() is not None:
        told = "faulting in staging memory ahead failed, the first saves will be slower: %s"
        report(logging.WARNING, told, done.exception(), warning=RuntimeWarning)
