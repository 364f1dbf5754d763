"""Checkpoints between `create` and committed: bookkeeping, the commit itself, and every way of ending.

Guarantees:
- A pending commit always resolves: with the tag, or with the first failure of any of its parts.
- Nothing here refers to the engine object, so that an engine that is dropped, or an interpreter that exits, still
  finishes its pending commits (with a warning), names what was never committed, and never hangs past `close_timeout_s`.
- The first failure that nobody has asked for is raised by the next `create` and by `close`; when the interpreter exits
  with one, the exit code is not 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from .. import retention
from ..errors import BackpressureTimeout, CheckpointError, TransactionStateError, WriteError, report
from ..format.manifest import FileEntry
from ..metrics import CommitMetrics, Span, on_publish_step
from ..ranks.coordinator import Coordinator, LocalCoordinator
from ..reading import verify
from ..reading.catalog import Catalog
from ..storage import transaction
from ..storage.filesystem import FileSystem
from ..storage.local_filesystem import LocalFileSystem
from ..storage.staged import State
from ..writer.chunks import WrittenFile
from ..writer.file import FileWrite
from ..writer.pool import WriterPool
from . import at_exit
from .checkpoint import OpenCheckpoint, SavedFile, given_up, joined
from .config import EngineConfig
from .mirroring import EngineMirrors, hold_for_mirrors
from .observing import Callbacks
from .pending import PendingCommit

if TYPE_CHECKING:
    from ..snapshot.arena import StagingArena

_NUM_REMEMBERED = 128
# Warming ahead ends at the next chunk or plan; nothing of it waits for the disk.
_WARMUP_END_S = 10.0


class InFlight:
    """The writer pool and the checkpoints that use it. Calls come from the engine, under its lock."""

    def __init__(self, config: EngineConfig, root: str, num_helpers: int = 0) -> None:
        self.pid = os.getpid()
        self.closed = False
        self._has_stopped = False
        self.root = root
        self._config = config
        self.filesystem: FileSystem = config.filesystem or LocalFileSystem()
        self._coordinator: Coordinator = config.coordinator or LocalCoordinator()
        self._failures: list[BaseException] = []
        self._rotation = retention.Rotation(self.filesystem, root, config.retention, hold_for_mirrors(config, self))
        self.mirrors: EngineMirrors | None = None
        with contextlib.ExitStack() as undo:
            self._start_threads(undo, num_helpers)
            transaction.make_root(self.filesystem, root)
            undo.callback(self._coordinator.close)
            self._coordinator.bind(self.filesystem, root)
            if config.sweep_on_start:
                self._coordinator.sweep()
            if config.mirrors:
                self.mirrors = EngineMirrors(config, self.filesystem, root, self._coordinator, self.callbacks, self._rotate)
            undo.pop_all()
        self._arena: StagingArena | None = None
        self._open: OrderedDict[str, OpenCheckpoint] = OrderedDict()
        self._commits: list[PendingCommit] = []
        self.num_remembered = _NUM_REMEMBERED
        self._last_created_ns = 0
        self._first_created_ns = 0
        self._oldest_possible_ns: int | None = None
        self._call_off: Callable[[], object] = lambda: None
        self.warming: list[Future[None]] = []

    def _start_threads(self, undo: contextlib.ExitStack, num_helpers: int) -> None:
        """All of them, before anything is made on disk; `undo` ends them."""
        try:
            self.callbacks = Callbacks(self._config.observers)
            undo.callback(self.callbacks.close, 0.0)
            self.pool = WriterPool(
                self.filesystem,
                num_writers=self._config.num_writers,
                num_helpers=num_helpers,
                io_mode=self._config.io_mode,
                on_span=self.callbacks.on_span if self._config.observers else None,
                name="async-ckpt",
            )
            undo.callback(self.pool.close)
        except (OSError, RuntimeError, MemoryError) as error:
            # RuntimeError: Python could not start a thread.
            code = (error.errno if isinstance(error, OSError) else None) or errno.EAGAIN
            raise WriteError(
                f"the writer's threads cannot be started ({error}); nothing was written, no thread is left behind: "
                "lower num_writers, or raise the limits of this process (ulimit -u, -n, -v)",
                errno=code,
                path=self.root,
            ) from error

    def warm(self, work: Callable[[], None]) -> Future[None]:
        """Run `work`, which prepares later saves, in the background. It must end soon once the arena is poisoned."""
        self.warming = [*(job for job in self.warming if not job.done()), self.pool.submit_io(work)]
        return self.warming[-1]

    def adopt(self, arena: StagingArena) -> None:
        """The arena whose waits must end when the writer dies, and which closing gives back."""
        self._arena = arena
        self.pool.on_death(arena.poison)

    def finalize_with(self, engine: object) -> None:
        """Tidy up when `engine` is dropped without close, or the interpreter exits."""
        self._call_off = at_exit.watch(engine, self)

    # Which calls are legal now.

    def forked_message(self) -> str:
        return (
            f"this engine belongs to process {self.pid} and this is process {os.getpid()}, forked from it: "
            "make a new AsyncCheckpointEngine here. The parent's checkpoints are not affected"
        )

    def check_usable(self) -> None:
        if os.getpid() != self.pid:
            raise TransactionStateError(self.forked_message())
        if self.closed:
            raise TransactionStateError(f"the engine on {self.root!r} is closed; make a new one")

    def current(self) -> OpenCheckpoint:
        """The checkpoint opened last."""
        if not self._open:
            raise TransactionStateError("no checkpoint is open: call create(tag) before save or makedirs. Nothing was written")
        return next(reversed(self._open.values()))

    def require_open(self, tag: str) -> OpenCheckpoint:
        checkpoint = self._open.get(tag)
        if checkpoint is not None:
            return checkpoint
        ended = self._last_commit(tag)
        if ended is not None and ended.failure() is not None:
            failure = ended.failure()
            assert failure is not None
            raise failure
        state = "its commit was called already" if ended is not None else f"open are: {', '.join(self._open) or 'none'}"
        raise TransactionStateError(f"checkpoint {tag!r} is not open ({state}); call create({tag!r}) first. Nothing was changed")

    def raise_unacknowledged(self) -> None:
        """Raise the first failure that nobody has asked for yet; each is raised once."""
        for pending in self.unacknowledged():
            pending.result()
        if self._failures:
            raise self._failures.pop(0)
        if self.mirrors is not None:
            self.mirrors.raise_unacknowledged()

    # Opening and writing.

    def open(self, tag: str) -> OpenCheckpoint:
        known = self._open.get(tag)
        if known is not None:
            if known.error is None and known.state is State.OPEN:
                raise TransactionStateError(f"checkpoint {tag!r} is open already; commit or abort it first")
            self.abort(tag, known.error or TransactionStateError(f"the call of commit({tag!r}) was interrupted"))
        earlier = self.find_unfinished(tag)
        elsewhere = any(other.find_unfinished(tag) for other in at_exit.others_on(self.root, self))
        if (earlier is not None or elsewhere) and self._config.overwrite == "refuse":
            raise TransactionStateError(f"a commit of {tag!r} is pending; wait for it, or use another tag")
        self.pool.check()
        checkpoint = OpenCheckpoint(self._coordinator.begin(tag, self._config.overwrite), CommitMetrics(tag), after=earlier)
        self._open[tag] = checkpoint
        return checkpoint

    def open_file(self, checkpoint: OpenCheckpoint, path: str, size_bytes: int, seal: Callable[[int, memoryview], int]) -> FileWrite:
        location = joined(checkpoint.opened.location, path)
        return self.pool.open_file(location, size_bytes=size_bytes, seal=seal, make_parents="/" in path, tag=checkpoint.tag)

    def report(self, kind: str, start_s: float, tag: str, path: str = "", offset: int = 0, num_bytes: int = 0) -> None:
        """Tell the observers about a piece of work that ended now, on this thread."""
        self.callbacks.on_span(Span(kind, start_s, time.perf_counter(), threading.current_thread().name, tag, path, offset, num_bytes))

    def copy_reporter(self, tag: str, path: str) -> Callable[[str, float, int, int], None] | None:
        """What the snapshot of one file calls per copied chunk; None when nobody observes."""
        if not self._config.observers:
            return None
        return lambda kind, start_s, offset, num_bytes: self.report(kind, start_s, tag, path, offset, num_bytes)

    def abort(self, tag: str, error: BaseException) -> None:
        """Give an open checkpoint up; blocks until its writes ended."""
        checkpoint = self._open.pop(tag, None)
        if checkpoint is None:
            raise TransactionStateError(f"checkpoint {tag!r} is not open; nothing was changed")
        given_up = self.pool.run(self._give_up_open(checkpoint, error))
        if not wait([given_up], self._config.close_timeout_s).done:
            raise BackpressureTimeout(
                f"giving up checkpoint {tag!r} did not end within {self._config.close_timeout_s:g} s and goes on; it waits for "
                f"{self.pool.waiting_for()}. Nothing is visible under that tag"
            )
        given_up.result()

    # Committing.

    def unfinished(self) -> list[PendingCommit]:
        return [pending for pending in self._commits if not pending.done()]

    def unacknowledged(self) -> list[PendingCommit]:
        """Failed commits whose outcome nobody has asked for."""
        return [pending for pending in self._commits if pending.failure() is not None and not pending.acknowledged]

    def find_unfinished(self, tag: str) -> PendingCommit | None:
        pending = self._last_commit(tag)
        return pending if pending is not None and not pending.done() else None

    def await_commit(self, tag: str) -> None:
        """Wait for pending commits of this tag in this process, if there are any."""
        self._await(found for each in (self, *at_exit.others_on(self.root, self)) if (found := each.find_unfinished(tag)))

    def await_others(self) -> None:
        """Wait for the pending commits of other engines of this process in this root; log those that have failed unheard."""
        others = at_exit.others_on(self.root, self)
        self._await(pending for other in others for pending in other.unfinished())
        for pending in [pending for other in others for pending in other.unacknowledged()]:
            told = "checkpoint %r of another engine of this process on %r was not committed: %s"
            report(logging.WARNING, told, pending.tag, self.root, pending.failure())

    def _await(self, commits: Iterable[PendingCommit]) -> None:
        timeout_s = self._config.backpressure_timeout_s
        for pending in list(commits):
            if not pending.wait(timeout_s):
                raise BackpressureTimeout(f"the commit of {pending.tag!r} did not end within {timeout_s:g} s; it goes on")

    def _last_commit(self, tag: str) -> PendingCommit | None:
        return next((pending for pending in reversed(self._commits) if pending.tag == tag), None)

    def _forget_some(self) -> None:
        """Keep what is unfinished, failures that nobody has asked for, and the last few."""
        older, recent = self._commits[: -self.num_remembered], self._commits[-self.num_remembered :]
        kept = [pending for pending in older if not pending.done() or (pending.failure() is not None and not pending.acknowledged)]
        self._commits = [*kept, *recent]

    def await_slot(self) -> None:
        """Wait until fewer than `max_pending_commits` are unfinished."""
        timeout_s = self._config.backpressure_timeout_s
        deadline = time.monotonic() + timeout_s
        while len(pending := self.unfinished()) >= self._config.max_pending_commits:
            if not pending[0].wait(deadline - time.monotonic()):
                raise BackpressureTimeout(
                    f"{len(pending)} commits are pending and none ended within {timeout_s:g} s; waiting for "
                    f"{self.pool.waiting_for()}. The checkpoint stays open: call commit again, or raise max_pending_commits"
                )

    def commit(self, checkpoint: OpenCheckpoint, metadata: Mapping[str, Any], started_s: float) -> PendingCommit:
        checkpoint.commit_s = started_s
        # Strictly increasing, so that "newest" means the order of the commit calls even when the clock steps back.
        self._last_created_ns = max(time.time_ns(), self._last_created_ns + 1)
        self._first_created_ns = self._first_created_ns or self._last_created_ns
        pending = PendingCommit(checkpoint.tag, checkpoint.metrics, self.pool.waiting_for, self.callbacks.run)
        if len(self._commits) >= 2 * self.num_remembered:
            self._forget_some()
        checkpoint.metrics.stall_s += time.perf_counter() - started_s
        # In this order an interrupt is harmless anywhere: what the loop did not get is still open, what it got ends there,
        # and nothing is waited for that nobody will resolve.
        done = self.pool.run(self._commit(checkpoint, metadata, self._last_created_ns))
        pending.mirrored = None if self.mirrors is None else self.mirrors.expect(checkpoint.tag)
        done.add_done_callback(lambda future: self._ended(checkpoint, pending, future))
        self._commits.append(pending)
        del self._open[checkpoint.tag]
        return pending

    async def _commit(self, checkpoint: OpenCheckpoint, metadata: Mapping[str, Any], created_unix_ns: int) -> None:
        # On the loop, like every change of it from here on: see `_give_up_open`.
        checkpoint.state = State.SEALED if checkpoint.state is State.OPEN else checkpoint.state
        try:
            if checkpoint.error is not None:
                raise checkpoint.error
            await self._finish(checkpoint, metadata, created_unix_ns)
        except BaseException as error:
            checkpoint.fail(error)
            await self._give_up(checkpoint, error)
            raise

    async def _finish(self, checkpoint: OpenCheckpoint, metadata: Mapping[str, Any], created_unix_ns: int) -> None:
        entries = []
        rank = self._coordinator.rank if self._coordinator.world_size > 1 else None
        for path, saved in checkpoint.files.items():
            written = await asyncio.wrap_future(saved.write.done)
            self._record(saved, written)
            entries.append(saved.entry(path, written, rank))
        if checkpoint.after is not None:
            await checkpoint.after.ended()
        location = await asyncio.wrap_future(checkpoint.opened.location)
        await self._on_io_thread(lambda: self._conclude(checkpoint, location, entries, metadata, created_unix_ns))

    def _conclude(
        self, checkpoint: OpenCheckpoint, location: str, entries: list[FileEntry], metadata: Mapping[str, Any], created_unix_ns: int
    ) -> None:
        """All that is left to do once the files are synced."""
        self._complete(checkpoint, location, entries)
        checkpoint.state = State.DURABLE
        started = time.perf_counter()
        self._publish(checkpoint, entries, metadata, self._after_older(created_unix_ns))
        checkpoint.state = State.COMMITTED
        self._measure(checkpoint, entries, started)
        checkpoint.metrics.num_undeleted = self._rotate()

    def _rotate(self) -> int:
        """Let retention work, on the rank that leads; returns how many could not be deleted. Blocks on the disk."""
        if not self._coordinator.leads:
            return 0
        try:
            return self._rotation.apply()
        except CheckpointError as failure:
            # The new checkpoint is durable: its commit succeeded. The failure is raised by the next create or close.
            self._failures.append(failure)
            return 0

    def _publish(self, checkpoint: OpenCheckpoint, entries: list[FileEntry], metadata: Mapping[str, Any], created_unix_ns: int) -> None:
        started = time.perf_counter()
        if checkpoint.opened.staging is not None:
            checkpoint.opened.staging.timing = checkpoint.timing()
        token = on_publish_step.set(lambda kind, start_s: self.report(kind, start_s, checkpoint.tag))
        try:
            self._coordinator.publish(checkpoint.opened, entries, metadata, created_unix_ns)
        finally:
            on_publish_step.reset(token)
            self.report("publish", started, checkpoint.tag)

    def _after_older(self, created_unix_ns: int) -> int:
        """A later time than that of every checkpoint in the root, also when the clock was set back between two runs."""
        if self._oldest_possible_ns is None:
            try:
                entries = Catalog(self.root, self.filesystem).entries()
            except OSError as error:
                # Only the order after a clock that was set back is at stake; the next commit looks again.
                report(logging.WARNING, "the times of older checkpoints in %r cannot be read, this clock is trusted: %s", self.root, error)
                return created_unix_ns
            self._oldest_possible_ns = max((entry.manifest.created_unix_ns + 1 for entry in entries if entry.manifest), default=0)
        return created_unix_ns + max(0, self._oldest_possible_ns - self._first_created_ns)

    def _complete(self, checkpoint: OpenCheckpoint, location: str, entries: list[FileEntry]) -> None:
        """Make the directories that hold no file, and read everything back where that was asked for."""
        transaction.make_directories(self.filesystem, location, sorted(map("/".join, checkpoint.directories)))
        if self._config.read_back:
            verify.read_back(self.filesystem, location, entries)

    async def _give_up_open(self, checkpoint: OpenCheckpoint, error: BaseException) -> None:
        """Unless its commit has begun all the same: then that decides."""
        if checkpoint.state is State.OPEN:
            checkpoint.fail(error)
            await self._give_up(checkpoint, error)
            self.callbacks.on_abort(checkpoint.metrics, error)

    async def _give_up(self, checkpoint: OpenCheckpoint, error: BaseException) -> None:
        """End all writes of a failed checkpoint, then remove what it staged; the first failure stays the one reported."""
        checkpoint.state = State.ABORTED
        for saved in checkpoint.files.values():
            saved.write.abort(error)
        writes = [asyncio.wrap_future(saved.write.done) for saved in checkpoint.files.values()]
        await asyncio.gather(*writes, return_exceptions=True)
        try:
            await self._on_io_thread(lambda: self._coordinator.abort(checkpoint.opened, error))
        except BaseException as failure:  # noqa: BLE001 -- the first failure is the one to be told
            # The staging directory stays; the sweep of a later start removes it.
            report(logging.WARNING, "could not remove the staging directory of %r after %r: %s", checkpoint.tag, error, failure)

    def delete(self, tag: str) -> None:
        """Delete a committed checkpoint, on the rank that leads. Blocks on the disk."""
        self.await_commit(tag)
        if self._coordinator.leads:
            transaction.remove(self.filesystem, self.root, tag)

    def _on_io_thread(self, call: Callable[[], None]) -> asyncio.Future[None]:
        return asyncio.wrap_future(self.pool.submit_io(call))

    def _record(self, saved: SavedFile, written: WrittenFile) -> None:
        metrics = saved.metrics
        metrics.direct, metrics.crc_s, metrics.write_s, metrics.sync_s = written.direct, written.crc_s, written.write_s, written.sync_s
        metrics.durable_s = written.durable_s - saved.started_s
        if saved.copy is not None:
            metrics.copy_s = saved.copy.copy_s
        self.callbacks.on_save(metrics)

    def _measure(self, checkpoint: OpenCheckpoint, entries: list[FileEntry], publish_started_s: float) -> None:
        metrics, now = checkpoint.metrics, time.perf_counter()
        metrics.publish_s = now - publish_started_s
        metrics.commit_s = now - checkpoint.commit_s
        metrics.total_s = now - (checkpoint.first_save_s if checkpoint.first_save_s is not None else checkpoint.commit_s)
        metrics.size_bytes = sum(entry.size_bytes for entry in entries)
        metrics.num_files = len(entries)
        metrics.max_queue_chunks = self.pool.restart_max_queued()
        metrics.guard_wait_s = checkpoint.guard_wait_s
        metrics.stall_s += metrics.guard_wait_s

    def _ended(self, checkpoint: OpenCheckpoint, pending: PendingCommit, future: Future[None]) -> None:
        error = future.exception() if not future.cancelled() else TransactionStateError("the commit was cancelled with the writer")
        pending.resolve(error)
        if self.mirrors is not None and pending.mirrored is not None:
            self.mirrors.committed(pending.mirrored, error)
        self.callbacks.on_commit(checkpoint.metrics, error)
        if error is not None:
            # Log handlers are the user's code too.
            self.callbacks.run(lambda: report(logging.ERROR, "checkpoint %r was not committed: %s", checkpoint.tag, error))

    # Ending.

    def close(self, timeout_s: float = float("inf"), reason: BaseException | None = None) -> None:
        """Wait for pending commits, give up open checkpoints (named in a warning), stop the threads.

        Bounded by `timeout_s` and the configuration's `close_timeout_s`. `reason`: the exception that has led here.
        """
        timeout_s = min(timeout_s, self._config.close_timeout_s)
        forgotten: list[str] = []
        deadline = time.monotonic() + timeout_s
        is_impatient = True
        try:
            self._abandon_open(reason, forgotten)
            for pending in self.unfinished():
                if not pending.wait(deadline - time.monotonic()):
                    raise BackpressureTimeout(
                        f"{len(self.unfinished())} commit(s) did not end within {timeout_s:g} s, the first is "
                        f"{pending.tag!r}; waiting for {self.pool.waiting_for()}. They are not visible; older checkpoints are untouched"
                    )
            is_impatient = False
        except Exception:
            is_impatient = False
            raise
        finally:
            # KeyboardInterrupt while waiting: the user wants out, and hears of nothing else.
            self.closed = True
            self._call_off()
            try:
                left_s = 0.1 if is_impatient else max(0.1, deadline - time.monotonic())
                if self.mirrors is not None:
                    self.mirrors.close(min(left_s, self._config.mirror_timeout_s))
                self.stop(max(0.1, deadline - time.monotonic()))
            except BackpressureTimeout as timeout:
                if not is_impatient:
                    raise
                report(logging.WARNING, "the engine on %r was interrupted while it was closing: %s", self.root, timeout)
            finally:
                for tag in forgotten:
                    told = "checkpoint %r was created but never committed: it is given up, nothing is visible under that tag"
                    report(logging.WARNING, told, tag, warning=RuntimeWarning, stacklevel=4)

    def _abandon_open(self, reason: BaseException | None, forgotten: list[str]) -> None:
        """Give up all open checkpoints; those that the user does not know of yet are added to `forgotten`."""
        for tag in list(self._open):
            checkpoint = self._open[tag]
            if checkpoint.error is None and checkpoint.state is State.OPEN:
                forgotten.append(tag)
            self.abort(tag, checkpoint.error or given_up(f"the engine was closed before commit({tag!r})", reason))

    def stop(self, timeout_s: float) -> None:
        """The threads' end; goes on where an interrupt has cut it short, and does nothing once it is done."""
        if self._has_stopped:
            return
        deadline = time.monotonic() + timeout_s
        if self._arena is not None:
            self._arena.poison(TransactionStateError("the engine is closed"))
        # A thread that is inside torch when the interpreter ends takes the process down with it.
        wait(self.warming, _WARMUP_END_S)
        self.pool.close(timeout_s)
        self._coordinator.close()
        if self._arena is not None:
            self._arena.close()
        self.callbacks.close(max(0.1, deadline - time.monotonic()))
        self._has_stopped = True
