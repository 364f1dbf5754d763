"""One checkpoint from `create` to committed: its files and directories, its state, its first failure, and its
commit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from ..errors import PathExistsError, TransactionStateError, WriteError
from ..format.manifest import FileEntry, Manifest, ManifestBudget
from ..metrics import CommitMetrics, SaveMetrics
from ..plan.plan import FilePlan, PlannedState
from ..ranks.coordinator import Coordinator
from ..ranks.joining import RankStaging
from ..reading import committed
from ..snapshot.owned_storages import NOTHING
from ..storage import transaction
from ..storage.staged import Destination, Staging, State
from ..writer.file import FileWrite
from .pending import PendingCommit
from .pipeline import SavePipeline
from .replicated import Replica

if TYPE_CHECKING:
    from ..snapshot.file_copy import FileCopy
    from ..snapshot.step_exclusion import Turn
    from .reuse import NewFile


@dataclass(slots=True)
class SavedFile:
    """One file of a checkpoint, on its way to the disk."""

    write: FileWrite
    metrics: SaveMetrics
    plan: FilePlan
    started_s: float
    copy: FileCopy | None = None
    new: NewFile | None = None
    replica: Replica | None = None
    """Where it is only this rank's share of a file."""


class Checkpoint:
    """A checkpoint that is not committed yet. The engine's lock until `commit` is called, the writer's threads from
    then on. `after`: an unfinished commit of the same tag, which must be published before this one.

    Raises as `Coordinator.begin`; but where failures are tolerated, those of the disk are no error here: nothing is
    made, what is saved is left out, and the commit fails.
    """

    def __init__(
        self, pipeline: SavePipeline, coordinator: Coordinator, destination: Destination, after: PendingCommit | None
    ) -> None:
        config = pipeline.config
        self.is_tolerant = config.on_commit_failure != "raise"
        """Whether its failure is told by its commit alone."""
        self.error: BaseException | None = None
        """Its first failure."""
        try:
            self.staging = coordinator.begin(destination, config.overwrite)
        except WriteError as failure:
            if not self.is_tolerant:
                raise
            self.staging = Staging(destination, config.overwrite, state=State.ABORTED)
            self.error = failure
        self.staging.rewrites = config.rewrite
        self.tag = self.staging.tag
        # The disk has just been asked for the staging directory; the call of `commit` asks it nothing.
        self.real_root = os.path.realpath(self.staging.root)
        self.metrics = CommitMetrics(self.tag)
        self.files: dict[str, SavedFile] = {}
        self.budget = ManifestBudget()
        self.commit_s = 0.0
        self._pipeline, self._coordinator, self._after = pipeline, coordinator, after
        self._directories: set[tuple[str, ...]] = set()

    @property
    def ended_unix_s(self) -> float | None:
        """When it failed, by one clock for all ranks; None where they have not learnt that from each other."""
        outcome = self.staging.outcome if isinstance(self.staging, RankStaging) else None
        return None if outcome is None else outcome.ended_unix_s

    @property
    def is_open(self) -> bool:
        """Whether it has neither failed nor been sealed."""
        return self.error is None and self.staging.state is State.OPEN

    # While it is open.

    def is_healthy(self) -> bool:
        """Whether it has not failed. Raises its first failure, unless that is to be told by its commit alone."""
        if self.error is None:
            for saved in self.files.values():
                self.error = self.error or saved.write.done.failure()
        if self.error is not None and not self.is_tolerant:
            raise self.error
        return self.error is None

    def fail(self, error: BaseException) -> None:
        """Remember the first failure. KeyboardInterrupt and the like would end whatever loop meets them later."""
        if self.error is not None:
            return
        if isinstance(error, Exception):
            self.error = error
        else:
            told = f"checkpoint {self.tag!r} was interrupted by {error!r}; it is not committed"
            self.error = TransactionStateError(told)
            self.error.__cause__ = error

    def _check_new(self, path: str) -> None:
        """Refuse a path that was saved before, or that is a directory or below a file."""
        parts = tuple(path.split("/"))
        # A copy: a signal handler may save another file meanwhile.
        is_folder = parts in self._directories or any(name.startswith(f"{path}/") for name in list(self.files))
        if path in self.files or is_folder or any("/".join(parts[:n]) in self.files for n in range(1, len(parts))):
            raise PathExistsError(
                f"{path!r} was saved or made already in the open checkpoint {self.tag!r}; the first one is kept"
            )

    def add_directory(self, parts: tuple[str, ...], *, exist_ok: bool) -> None:
        """Remember a directory and its parents."""
        path = "/".join(parts)
        if path in self.files:
            raise PathExistsError(f"{path!r} is a file of the open checkpoint {self.tag!r}")
        if not exist_ok and (not parts or parts in self._directories):
            raise PathExistsError(f"directory {path or '.'!r} of the open checkpoint {self.tag!r} exists already")
        self._directories.update(parts[:n] for n in range(1, len(parts) + 1))

    def save(
        self,
        path: str,
        state_dict: Any,
        started_s: float,
        format: Literal["torch", "safetensors"] | None,
        turn: Turn | None,
        replicated: bool,
    ) -> None:
        """See `AsyncCheckpointEngine.save`."""
        if not self.is_healthy():
            return
        self._check_new(path)
        pipeline, coordinator = self._pipeline, self._coordinator
        is_shared = replicated and coordinator.num_sharing > 1
        if replicated and not is_shared and not coordinator.leads:
            # Where each node has a root of its own, its first rank saves the file.
            return
        began_s = time.perf_counter()
        # An integration may have planned the file itself.
        is_planned, own = isinstance(state_dict, PlannedState), self.staging.destination.loads_itself
        is_own = own is not None and own.fullmatch(path.rpartition("/")[2]) is not None
        how: Any = {"name": path, "format": format, "is_frameworks": is_own}
        state: PlannedState = state_dict if is_planned else pipeline.planner.plan(state_dict, **how)
        metrics = SaveMetrics(self.tag, path, size_bytes=state.plan.file_bytes, num_tensors=len(state.tensors))
        metrics.planner, metrics.plan_cached = state.plan.planner, state.cached
        metrics.plan_s, metrics.pinned = time.perf_counter() - began_s, pipeline.arena.pinning is not None
        saved = self.files[path] = self._open(state, metrics, is_shared=is_shared)
        self.metrics.saves.append(metrics)
        try:
            saved.copy = copy = self._snapshot(state, saved, turn)
        except BaseException as error:
            # A file that ends half way must never be committed, whatever interrupted it.
            self.fail(error)
            saved.write.abort(error)
            raise
        if not copy.copied.done():
            pipeline.guard.track(copy)
        metrics.mode, metrics.backpressure_s = copy.mode, copy.backpressure_s
        metrics.stall_s = time.perf_counter() - started_s
        if pipeline.observes:
            pipeline.callbacks.tell_span("save", started_s, self.tag, path, 0, metrics.size_bytes)
        self.metrics.stall_s += metrics.stall_s

    def _open(self, state: PlannedState, metrics: SaveMetrics, *, is_shared: bool) -> SavedFile:
        plan, path, pipeline, coordinator = state.plan, metrics.path, self._pipeline, self._coordinator
        chunk_bytes = pipeline.arena.chunk_bytes
        manifest_bytes = self.budget.add_file(path, plan.file_bytes, chunk_bytes)
        if is_shared and not coordinator.leads:
            # One line for all ranks.
            manifest_bytes = 0
        replica: Replica | None = None
        if is_shared:
            num_writers, reads_back = pipeline.num_writers_of(coordinator), pipeline.config.read_back
            replica = Replica(path, state, chunk_bytes, coordinator.rank, num_writers, reads_back=reads_back)
        new = pipeline.reuse.begin(path, state) if pipeline.reuse.is_on and replica is None else None
        write = pipeline.pool.open_file(
            path,
            folder=coordinator.admit(self.staging, path, manifest_bytes),
            size_bytes=plan.file_bytes,
            seal=replica.seal if replica is not None else plan.sealer() if new is None else new.seal,
            tag=self.tag,
            older=None if new is None or new.known is None else new.older,
            pass_over=None if new is None else new.pass_over,
            share=None if replica is None else replica.share,
        )
        return SavedFile(write, metrics, plan, time.perf_counter(), new=new, replica=replica)

    def _snapshot(self, state: PlannedState, saved: SavedFile, turn: Turn | None) -> FileCopy:
        pipeline, write, replica, path = self._pipeline, saved.write, saved.replica, saved.metrics.path
        elsewhere = frozenset[int]() if saved.new is None else saved.new.elsewhere(write)
        guarded = pipeline.guard.owned(state.storage_ids)
        if guarded is NOTHING and turn is not None:
            # Nothing here is changed by a guarded step: those of other threads may go on.
            turn.end()

        def tell_copied(kind: str, start_s: float, offset: int, num_bytes: int) -> None:
            pipeline.callbacks.tell_span(kind, start_s, self.tag, path, offset, num_bytes)

        return pipeline.snapshotter.take(
            state,
            write,
            name=path,
            guarded=guarded,
            on_copied=tell_copied if pipeline.observes else None,
            elsewhere=elsewhere,
            chunks_of=None if replica is None else (replica.share.start, replica.share.copied_end),
        )

    # Its commit: on the loop, and at the end on an I/O thread.

    async def finish_files(self) -> list[FileEntry]:
        """Wait until every file is synced. Raises the first failure."""
        # On the loop, like every change of it from here on: see `give_up`.
        if self.staging.state is State.OPEN:
            self.staging.state = State.SEALED
        if self.error is not None:
            raise self.error
        entries = []
        for path, saved in self.files.items():
            await saved.write.done
            entry = self._entry(path, saved)
            if saved.replica is None:
                entries.append(entry)
            else:
                self.staging.shared[path] = saved.replica
            self._pipeline.callbacks.tell("on_save", saved.metrics)
        await asyncio.wrap_future(self.staging.location)
        if self._after is not None:
            await self._after.ended()
        return entries

    def _entry(self, path: str, saved: SavedFile) -> FileEntry:
        """The manifest's line for a file that is synced; notes what that has cost."""
        metrics, write, plan = saved.metrics, saved.write, saved.plan
        share = None if saved.replica is None else saved.replica.share
        metrics.shared_bytes = 0 if write.sharing is None else write.sharing.shared_bytes
        metrics.written_bytes = (share.end - share.start if share else write.size_bytes) - metrics.shared_bytes
        metrics.direct, metrics.crc_s = write.direct, write.seconds["crc"]
        metrics.write_s, metrics.sync_s = write.seconds["write"], write.seconds["fsync"]
        metrics.durable_s = write.durable_s - saved.started_s
        if saved.copy is not None:
            metrics.copy_s = saved.copy.copy_s
        return FileEntry(
            path=path,
            size_bytes=write.size_bytes,
            extent_bytes=max(1, write.extent_bytes),
            # An empty file went through the writer as one chunk of no bytes; a manifest has no empty extents.
            extent_crc32=tuple(write.extent_crc32) if write.size_bytes else (),
            format=plan.format,
            planner=plan.planner,
            plan_hash=plan.plan_hash,
            rank=self._coordinator.rank if self._coordinator.world_size > 1 else None,
            shared_bytes=metrics.shared_bytes,
        )

    def publish(self, manifest: Manifest) -> None:
        """All that is left to do once the files are synced. Blocks on the disk."""
        staging, pipeline = self.staging, self._pipeline
        if self._directories:
            transaction.make_directories(pipeline.filesystem, staging.path, sorted(map("/".join, self._directories)))
        if pipeline.config.read_back:
            committed.read_back(pipeline.filesystem, staging.path, manifest.files)
        started_s, files = time.perf_counter(), self.files.values()
        first_save_s = min((saved.started_s for saved in files), default=self.commit_s)
        self.metrics.guard_wait_s = sum(saved.copy.guard_wait_s for saved in files if saved.copy is not None)
        self.metrics.stall_s += self.metrics.guard_wait_s
        if files:
            durable_s = max(saved.started_s + saved.metrics.durable_s for saved in files) - first_save_s
            staging.timing = {"stall_s": round(self.metrics.stall_s, 6), "durable_s": round(durable_s, 6)}
        staging.on_step = self._tell_step if pipeline.observes else None
        try:
            self._coordinator.publish(staging, manifest)
        finally:
            if pipeline.observes:
                self._tell_step("publish", started_s)
        staging.state = State.COMMITTED
        metrics, now_s = self.metrics, time.perf_counter()
        metrics.publish_s = now_s - started_s
        metrics.commit_s = now_s - self.commit_s
        metrics.total_s = now_s - first_save_s
        metrics.size_bytes = sum(saved.metrics.size_bytes for saved in files)
        metrics.num_files = len(files)

    def _tell_step(self, kind: str, start_s: float) -> None:
        self._pipeline.callbacks.tell_span(kind, start_s, self.tag)

    async def give_up(self, error: BaseException) -> None:
        """End all writes, then remove what was staged; the first failure stays the one reported."""
        self.fail(error)
        for saved in self.files.values():
            saved.write.abort(error)
        for saved in self.files.values():
            await saved.write.done.ended()
        if self.staging.state is State.ABORTED:
            # It was never made.
            return
        try:
            abort = partial(self._coordinator.abort, self.staging, error)
            await asyncio.wrap_future(self._pipeline.pool.submit_io(abort))
        except BaseException as failure:  # noqa: BLE001 -- the first failure is the one to be told
            # The staging directory stays; the sweep of a later start removes it.
            told = "could not remove the staging directory of %r after %r: %s"
            self._pipeline.callbacks.report(logging.WARNING, told, self.tag, error, failure)


def given_up(message: str, reason: BaseException | None) -> TransactionStateError:
    """Why a checkpoint is given up. Other ranks learn nothing but this text, so it names what has led to it."""
    if reason is None:
        return TransactionStateError(message)
    error = TransactionStateError(f"{message} because of {type(reason).__name__}: {reason}")
    error.__cause__ = reason
    return error
