"""One checkpoint from `create` to committed: its files and directories, its state, its first failure, and its
commit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import PathExistsError, TransactionStateError, WriteError
from ..format.manifest import FileEntry, ManifestBudget
from ..metrics import CommitMetrics, OnStep, SaveMetrics
from ..ranks.coordinator import Coordinator
from ..ranks.joining import RankStaging
from ..reading import committed
from ..storage import transaction
from ..storage.filesystem import FileSystem
from ..storage.staged import Destination, Staging, State
from ..writer.file import FileWrite
from .config import EngineConfig
from .pending import PendingCommit

if TYPE_CHECKING:
    from ..plan.plan import FilePlan
    from ..snapshot.file_copy import FileCopy
    from .replicated import Replica
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


@dataclass(slots=True, eq=False)
class Checkpoint:
    """A checkpoint that is not committed yet. The engine's lock until `commit` is called, the writer's threads from
    then on.

    Args:
        is_tolerant: its failure is told by its commit alone.
        after: an unfinished commit of the same tag, which must be published before this one.
    """

    staging: Staging
    coordinator: Coordinator
    filesystem: FileSystem
    tag: str
    metrics: CommitMetrics
    real_root: str
    is_tolerant: bool = False
    after: PendingCommit | None = None
    files: dict[str, SavedFile] = field(default_factory=dict)
    directories: set[tuple[str, ...]] = field(default_factory=set)
    budget: ManifestBudget = field(default_factory=ManifestBudget)
    error: BaseException | None = None
    """Its first failure."""
    commit_s: float = 0.0

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

    def check_new(self, path: str) -> None:
        """Refuse a path that was saved before, or that is a directory or below a file."""
        parts = tuple(path.split("/"))
        # A copy: a signal handler may save another file meanwhile.
        is_folder = parts in self.directories or any(name.startswith(f"{path}/") for name in list(self.files))
        if path in self.files or is_folder or any("/".join(parts[:n]) in self.files for n in range(1, len(parts))):
            raise PathExistsError(
                f"{path!r} was saved or made already in the open checkpoint {self.tag!r}; the first one is kept"
            )

    def add_directory(self, parts: tuple[str, ...], *, exist_ok: bool) -> None:
        """Remember a directory and its parents."""
        path = "/".join(parts)
        if path in self.files:
            raise PathExistsError(f"{path!r} is a file of the open checkpoint {self.tag!r}")
        if not exist_ok and (not parts or parts in self.directories):
            raise PathExistsError(f"directory {path or '.'!r} of the open checkpoint {self.tag!r} exists already")
        self.directories.update(parts[:n] for n in range(1, len(parts) + 1))

    # Its commit: on the loop, and at the end on an I/O thread.

    async def finish_files(self, on_save: Callable[[SaveMetrics], object]) -> list[FileEntry]:
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
            on_save(saved.metrics)
        await asyncio.wrap_future(self.staging.location)
        if self.after is not None:
            await self.after.ended()
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
            rank=self.coordinator.rank if self.coordinator.world_size > 1 else None,
            shared_bytes=metrics.shared_bytes,
        )

    def publish(
        self,
        entries: list[FileEntry],
        metadata: Mapping[str, Any],
        created_unix_ns: int,
        *,
        read_back: bool,
        on_step: OnStep | None,
    ) -> None:
        """All that is left to do once the files are synced. Blocks on the disk.

        Args:
            read_back: read all files again, and compare them with their CRCs, before anything is renamed.
            on_step: told about every step.
        """
        staging = self.staging
        if self.directories:
            transaction.make_directories(self.filesystem, staging.path, sorted(map("/".join, self.directories)))
        if read_back:
            committed.read_back(self.filesystem, staging.path, entries)
        started_s, files = time.perf_counter(), self.files.values()
        first_save_s = min((saved.started_s for saved in files), default=self.commit_s)
        self.metrics.guard_wait_s = sum(saved.copy.guard_wait_s for saved in files if saved.copy is not None)
        self.metrics.stall_s += self.metrics.guard_wait_s
        if files:
            durable_s = max(saved.started_s + saved.metrics.durable_s for saved in files) - first_save_s
            staging.timing = {"stall_s": round(self.metrics.stall_s, 6), "durable_s": round(durable_s, 6)}
        staging.on_step = on_step
        try:
            self.coordinator.publish(staging, entries, metadata, created_unix_ns)
        finally:
            if on_step is not None:
                on_step("publish", started_s)
        staging.state = State.COMMITTED
        metrics, now_s = self.metrics, time.perf_counter()
        metrics.publish_s = now_s - started_s
        metrics.commit_s = now_s - self.commit_s
        metrics.total_s = now_s - first_save_s
        metrics.size_bytes = sum(saved.metrics.size_bytes for saved in files)
        metrics.num_files = len(files)

    async def give_up(
        self,
        error: BaseException,
        submit_io: Callable[[Callable[[], None]], Future[None]],
        tell: Callable[..., object],
    ) -> None:
        """End all writes, then remove what was staged; the first failure stays the one reported.

        Args:
            tell: logs a warning, on a thread that nothing waits for.
        """
        self.fail(error)
        for saved in self.files.values():
            saved.write.abort(error)
        for saved in self.files.values():
            await saved.write.done.ended()
        if self.staging.state is State.ABORTED:
            # It was never made.
            return
        try:
            await asyncio.wrap_future(submit_io(lambda: self.coordinator.abort(self.staging, error)))
        except BaseException as failure:  # noqa: BLE001 -- the first failure is the one to be told
            # The staging directory stays; the sweep of a later start removes it.
            told = "could not remove the staging directory of %r after %r: %s"
            tell(logging.WARNING, told, self.tag, error, failure)


def begin(
    coordinator: Coordinator,
    destination: Destination,
    config: EngineConfig,
    filesystem: FileSystem,
    after: PendingCommit | None,
) -> Checkpoint:
    """Open a checkpoint. Raises as `Coordinator.begin`.

    Where failures are tolerated, those of the disk are no error here: nothing is made, what is saved is left out, and
    the commit fails.
    """
    is_tolerant, error = config.on_commit_failure != "raise", None
    try:
        staging = coordinator.begin(destination, config.overwrite)
    except WriteError as failure:
        if not is_tolerant:
            raise
        staging, error = Staging(destination, config.overwrite, state=State.ABORTED), failure
    staging.rewrites = config.rewrite
    # The disk has just been asked for the staging directory; the call of `commit` asks it nothing.
    real_root, metrics = os.path.realpath(staging.root), CommitMetrics(staging.tag)
    about = staging.tag, metrics, real_root
    return Checkpoint(staging, coordinator, filesystem, *about, is_tolerant, after, error=error)


def given_up(message: str, reason: BaseException | None) -> TransactionStateError:
    """Why a checkpoint is given up. Other ranks learn nothing but this text, so it names the exception that led
    to it.
    """
    if reason is None:
        return TransactionStateError(message)
    error = TransactionStateError(f"{message} because of {type(reason).__name__}: {reason}")
    error.__cause__ = reason
    return error
