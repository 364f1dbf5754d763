"""Checkpoints between `create` and committed: bookkeeping, the commit itself, and every way of ending.

Guarantees:
- A pending commit always resolves: with the tag, or with the first failure of any of its parts.
- Nothing here refers to the engine object, so that an engine that is dropped, or an interpreter that exits, still
  finishes its pending commits (with a warning), names what was never committed, and never hangs past `close_timeout_s`.
- The first failure that nobody has asked for is raised by the next `create` and by `close`; when the interpreter exits
  with one, the exit code is not 0. One that is tolerated is a warning instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import BackpressureTimeout, ConfigError, TransactionStateError, report
from ..format.manifest import Manifest
from ..format.names import Root, StrPath
from ..ranks.coordinator import Coordinator, LocalCoordinator
from ..reading.catalog import Catalog
from ..storage import transaction
from ..storage.filesystem import FileSystem
from ..storage.staged import Destination, State
from ..threads.executor import check_process
from ..threads.locks import Lock
from ..threads.outcome import announce
from .checkpoint import Checkpoint
from .config import EngineConfig
from .housekeeping import Housekeeping
from .pending import PendingCommit, Tolerate
from .pipeline import SavePipeline

_NUM_REMEMBERED = 128
"""Of the last commits, beside what is unfinished, and failures that nobody has asked for."""

live: weakref.WeakSet[Commits] = weakref.WeakSet()
"""Of all engines of this process that somebody holds."""


class Commits:
    """The checkpoints of one engine. Calls come from the engine, under `lock`."""

    def __init__(self, config: EngineConfig) -> None:
        self.pid = os.getpid()
        self.closed = False
        self.lock = Lock()
        self.paths = Root(config.root)
        self.root = root = self.paths.path
        self.config = config
        self.filesystem: FileSystem = config.filesystem or FileSystem()
        self.catalog = Catalog(self.paths, self.filesystem)
        self._coordinator: Coordinator = config.coordinator or LocalCoordinator()
        self._open: OrderedDict[str, Checkpoint] = OrderedDict()
        self._commits: list[PendingCommit] = []
        self.num_remembered = _NUM_REMEMBERED
        self._last_created_ns = 0
        self._first_created_ns = 0
        self.pipeline = SavePipeline(config, self.filesystem, make_room=self._make_room)
        callbacks = self.pipeline.callbacks
        self.house = Housekeeping(config, self.filesystem, self.catalog, self._coordinator, callbacks)
        with contextlib.ExitStack() as undo:
            undo.callback(self.pipeline.stop, config.close_timeout_s)
            made = transaction.make_root(self.filesystem, root, try_clones=self.pipeline.reuse.is_on)
            self.pipeline.reuse.tell(root, clones=self.filesystem.findings.clones)
            undo.callback(transaction.unmake, self.filesystem, made)
            self._real_root = os.path.realpath(root)
            undo.callback(self._coordinator.close)
            self._coordinator.bind(self.filesystem, root)
            self.house.start()
            undo.pop_all()
        self.pool, self.mirrors = self.pipeline.pool, self.house.mirrors
        live.add(self)

    # Which calls are legal now.

    def check_usable(self) -> None:
        check_process(self.pid, "this engine")
        if self.closed:
            raise TransactionStateError(f"the engine on {self.root!r} is closed; make a new one")

    def opened(self) -> list[Checkpoint]:
        """Those whose commit was not called yet."""
        return list(self._open.values())

    def locate(self, path: StrPath, *, carried: bool = False) -> tuple[Checkpoint, tuple[str, ...]]:
        """The open checkpoint a path belongs to, and its checked components inside the tag; () is the tag itself."""
        tag, parts = self.paths.split(path, carried=carried)
        if tag is not None:
            return self.require_open(tag), parts
        if not self._open:
            raise TransactionStateError(
                "no checkpoint is open: call create(tag) before save or makedirs. Nothing was written"
            )
        return next(reversed(self._open.values())), parts

    def require_open(self, tag: str) -> Checkpoint:
        checkpoint = self._open.get(tag)
        if checkpoint is not None:
            return checkpoint
        ended = next((pending for pending in reversed(self._commits) if pending.tag == tag), None)
        failure = None if ended is None else ended.failure()
        if failure is not None:
            raise failure
        state = "its commit was called already" if ended is not None else f"open are: {', '.join(self._open) or 'none'}"
        raise TransactionStateError(
            f"checkpoint {tag!r} is not open ({state}); call create({tag!r}) first. Nothing was changed"
        )

    def raise_unacknowledged(self) -> None:
        """Raise the first failure that nobody has asked for yet; each is raised once."""
        for pending in self.unacknowledged():
            if (loss := pending.loss()) is not None:
                raise loss
        if self.house.failures:
            raise self.house.failures.pop(0)
        if self.mirrors is not None:
            self.mirrors.raise_unacknowledged()

    # Opening and writing.

    def open(self, destination: Destination) -> None:
        started_s, tag = time.perf_counter(), destination.tag
        self.check_usable()
        self.raise_unacknowledged()
        known = self._open.get(tag)
        if known is not None:
            if known.is_open:
                raise TransactionStateError(f"checkpoint {tag!r} is open already; commit or abort it first")
            self.abort(tag, known.error or TransactionStateError(f"the call of commit({tag!r}) was interrupted"))
        if self.config.overwrite == "refuse" and any(one.find_unfinished(tag) for one in (self, *self.others())):
            raise TransactionStateError(f"a commit of {tag!r} is pending; wait for it, or use another tag")
        self.pool.check()
        checkpoint = Checkpoint(self.pipeline, self._coordinator, destination, self.find_unfinished(tag))
        checkpoint.metrics.stall_s += time.perf_counter() - started_s
        self._open[tag] = checkpoint

    def abort(self, tag: str, error: BaseException) -> None:
        """Give an open checkpoint up; blocks until its writes ended."""
        checkpoint = self._open.pop(tag, None)
        if checkpoint is None:
            raise TransactionStateError(f"checkpoint {tag!r} is not open; nothing was changed")
        given_up, timeout_s = self.pool.run(self._give_up_open(checkpoint, error)), self.config.close_timeout_s
        if not given_up.wait(timeout_s):
            raise BackpressureTimeout(
                f"giving up checkpoint {tag!r} did not end within {timeout_s:g} s and goes on; it "
                f"waits for {self.pool.waiting_for()}. Nothing is visible under that tag"
            )
        given_up.result()

    # Committing.

    def unfinished(self) -> list[PendingCommit]:
        return [pending for pending in self._commits if not pending.done()]

    def unacknowledged(self) -> list[PendingCommit]:
        """Failed commits that are still to be raised."""
        return [pending for pending in self._commits if pending.is_owed and pending.done()]

    def find_unfinished(self, tag: str) -> PendingCommit | None:
        return next((pending for pending in reversed(self._commits) if pending.tag == tag and not pending.done()), None)

    def others(self) -> list[Commits]:
        """Of other engines of this process on the same root: a retry may not have let go of the one before. Not of the
        other ranks of a job, which may be threads of this process."""
        mine = self._coordinator
        return [
            other
            for other in list(live)
            if other is not self
            and (other.pid, other._real_root) == (os.getpid(), self._real_root)
            and (other._coordinator.world_size != mine.world_size or other._coordinator.rank == mine.rank)
        ]

    def await_slot(self) -> None:
        """Wait until fewer than `max_pending_commits` are unfinished."""
        timeout_s = self.config.backpressure_timeout_s
        deadline = time.monotonic() + timeout_s
        while len(pending := self.unfinished()) >= self.config.max_pending_commits:
            if not pending[0].wait(deadline - time.monotonic()):
                raise BackpressureTimeout(
                    f"{len(pending)} commits are pending and none ended within {timeout_s:g} s; waiting for "
                    f"{self.pool.waiting_for()}. The checkpoint stays open: call commit again, or raise "
                    "max_pending_commits"
                )

    def commit(self, tag: str, metadata: Mapping[str, Any]) -> PendingCommit:
        started_s = time.perf_counter()
        self.check_usable()
        if self.config.on_commit_failure != "raise":
            self.raise_unacknowledged()
        checkpoint = self.require_open(tag)
        checkpoint.budget.check_metadata(metadata)
        self.await_slot()
        checkpoint.commit_s = started_s
        # Strictly increasing, so that "newest" means the order of the commit calls even when the clock steps back.
        self._last_created_ns = max(time.time_ns(), self._last_created_ns + 1)
        self._first_created_ns = self._first_created_ns or self._last_created_ns
        pending = PendingCommit(tag, checkpoint.metrics, self.pool.waiting_for, self.pipeline.callbacks.run)
        if len(self._commits) >= 2 * self.num_remembered:
            older, recent = self._commits[: -self.num_remembered], self._commits[-self.num_remembered :]
            self._commits = [*(one for one in older if one.is_owed or not one.done()), *recent]
        checkpoint.metrics.stall_s += time.perf_counter() - started_s
        # In this order an interrupt is harmless anywhere: what the loop did not get is still open, what it got ends
        # there, and nothing is waited for that nobody will resolve.
        done = self.pool.run(self._commit(checkpoint, pending, metadata, self._last_created_ns))
        pending.mirrored = self.house.expect(checkpoint.tag)
        done.when_done(lambda done: self._ended(checkpoint, pending, done.failure()))
        self._commits.append(pending)
        announce(pending, checkpoint.real_root)
        # A signal handler may have closed the engine.
        self._open.pop(tag, None)
        return pending

    async def _commit(
        self, checkpoint: Checkpoint, pending: PendingCommit, metadata: Mapping[str, Any], created_unix_ns: int
    ) -> None:
        try:
            entries = await checkpoint.finish_files()
            manifest = Manifest(checkpoint.tag, created_unix_ns, tuple(entries), metadata)
            publish = partial(self._publish, checkpoint, manifest)
            await asyncio.wrap_future(self.pool.submit_io(publish))
        except BaseException as error:
            self.pipeline.reuse.forget(checkpoint.files)
            await checkpoint.give_up(error)
            if isinstance(self.config.on_commit_failure, Tolerate) and isinstance(error, Exception):
                await self.config.on_commit_failure.judge(pending, error, list(self._commits), checkpoint.ended_unix_s)
            raise

    def _publish(self, checkpoint: Checkpoint, manifest: Manifest) -> None:
        created_unix_ns = self.house.after_older(manifest.created_unix_ns, self._first_created_ns)
        checkpoint.publish(replace(manifest, created_unix_ns=created_unix_ns))
        files = {path: (saved.write, saved.new) for path, saved in checkpoint.files.items()}
        self.pipeline.reuse.committed(checkpoint.staging.root, checkpoint.tag, files)
        checkpoint.metrics.max_queue_chunks = self.pool.disk.restart_max_queued()
        checkpoint.metrics.num_undeleted = self.house.rotate()

    async def _make_room(self, tag: str) -> None:
        """Wait for the commits before that of `tag` (for all, where that was not called yet), and let retention work
        once more.
        """
        for pending in list(self._commits):
            if pending.tag == tag and not pending.done():
                break
            await pending.ended()
        await asyncio.wrap_future(self.pool.submit_io(self.house.rotate))

    async def _give_up_open(self, checkpoint: Checkpoint, error: BaseException) -> None:
        """Unless its commit has begun all the same: then that decides."""
        if checkpoint.staging.state is State.OPEN:
            await checkpoint.give_up(error)
            self.pipeline.callbacks.tell("on_abort", checkpoint.metrics, error)

    def _ended(self, checkpoint: Checkpoint, pending: PendingCommit, error: BaseException | None) -> None:
        if error is not None and not pending.row:
            pending.verdict, pending.is_owed = error, True
        pending.resolve(checkpoint.tag, error)
        if self.mirrors is not None and pending.mirrored is not None:
            self.mirrors.committed(pending.mirrored, error)
        self.pipeline.callbacks.tell("on_commit", checkpoint.metrics, error)
        if pending.warning:
            self.pipeline.callbacks.report(logging.WARNING, "%s", pending.warning)
            self.pipeline.notes.append(pending.warning)
        elif error is not None:
            self.pipeline.callbacks.report(logging.ERROR, "checkpoint %r was not committed: %s", checkpoint.tag, error)

    # What is on the disk: not before the commits that this process has pending are over.

    def latest(self, verify: str, tier: str) -> str | None:
        """See `AsyncCheckpointEngine.latest`."""
        if tier not in ("disk", "any"):
            raise ConfigError(f"tier must be 'disk' or 'any', not {tier!r}")
        others = self.others()
        self._await(pending for other in others for pending in other.unfinished())
        for pending in [pending for other in others for pending in other.unacknowledged()]:
            told = "checkpoint %r of another engine of this process on %r was not committed: %s"
            report(logging.WARNING, told, pending.tag, self.root, pending.failure())
        return self.house.latest(verify, tier)

    def catalog_of(self, tag: str) -> Catalog:
        """See `AsyncCheckpointEngine.catalog_of`."""
        self._await_tag(tag)
        return self.house.catalog_of(tag)

    def delete(self, tag: str) -> None:
        """See `AsyncCheckpointEngine.delete`."""
        self._await_tag(tag)
        self.house.delete(tag)

    def _await_tag(self, tag: str) -> None:
        self.check_usable()
        engines = (self, *self.others())
        self._await(found for each in engines if (found := each.find_unfinished(tag)) is not None)

    def _await(self, pending: Iterable[PendingCommit]) -> None:
        timeout_s = self.config.backpressure_timeout_s
        for one in list(pending):
            if not one.wait(timeout_s):
                raise BackpressureTimeout(f"the commit of {one.tag!r} did not end within {timeout_s:g} s; it goes on")

    # Ending.

    def stop(self, timeout_s: float) -> None:
        """The end of the threads and the coordinator; goes on where an interrupt has cut it short."""
        self.closed = True
        deadline = time.monotonic() + timeout_s
        if self.mirrors is not None:
            self.mirrors.close(min(timeout_s, self.config.mirror_timeout_s))
        self.pipeline.stop(max(0.1, deadline - time.monotonic()))
        self._coordinator.close()
