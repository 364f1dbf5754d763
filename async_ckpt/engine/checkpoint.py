"""One checkpoint between `create` and committed, as plain data: its files, its directories, its first failure."""

from __future__ import annotations

import os
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..errors import PathExistsError, TransactionStateError
from ..format.manifest import FileEntry, FileFormat, ManifestBudget
from ..metrics import CommitMetrics, SaveMetrics
from ..ranks.coordinator import OpenTag
from ..storage.staged import State
from ..writer.chunks import WrittenFile
from ..writer.file import FileWrite
from .pending import PendingCommit

if TYPE_CHECKING:
    from ..snapshot.file_copy import FileCopy


@dataclass(slots=True)
class SavedFile:
    """One file of an open checkpoint, on its way to the disk."""

    write: FileWrite
    metrics: SaveMetrics
    format: FileFormat
    planner: str
    plan_hash: str
    started_s: float
    copy: FileCopy | None = None

    def entry(self, path: str, written: WrittenFile, rank: int | None) -> FileEntry:
        """The manifest's line for this file."""
        # An empty file went through the writer as one chunk of no bytes; a manifest has no empty extents.
        crcs = tuple(written.extent_crc32) if written.size_bytes else ()
        return FileEntry(
            path=path,
            size_bytes=written.size_bytes,
            extent_bytes=max(1, written.extent_bytes),
            extent_crc32=crcs,
            format=self.format,
            planner=self.planner,
            plan_hash=self.plan_hash,
            rank=rank,
        )


@dataclass(slots=True)
class OpenCheckpoint:
    """A checkpoint that has been created and is not committed yet."""

    opened: OpenTag
    metrics: CommitMetrics
    state: State = State.OPEN
    files: dict[str, SavedFile] = field(default_factory=dict)
    directories: set[tuple[str, ...]] = field(default_factory=set)
    budget: ManifestBudget = field(default_factory=ManifestBudget)
    error: BaseException | None = None
    first_save_s: float | None = None
    commit_s: float = 0.0
    after: PendingCommit | None = None
    """An unfinished commit of the same tag, which must be published before this one."""

    @property
    def tag(self) -> str:
        return self.opened.tag

    def check_healthy(self) -> None:
        """Raise the first failure of this checkpoint, if there was one."""
        if self.error is None:
            for saved in self.files.values():
                if saved.write.done.done() and saved.write.done.exception() is not None:
                    self.error = saved.write.done.exception()
                    break
        if self.error is not None:
            raise self.error

    def fail(self, error: BaseException) -> None:
        """Remember the first failure. KeyboardInterrupt and the like would end whatever loop meets them later."""
        if self.error is not None:
            return
        if isinstance(error, Exception):
            self.error = error
        else:
            self.error = TransactionStateError(f"checkpoint {self.tag!r} was interrupted by {error!r}; it is not committed")
            self.error.__cause__ = error

    def check_new(self, path: str) -> None:
        """Refuse a path that was saved before, or that is a directory or below a file."""
        parts = tuple(path.split("/"))
        is_folder = parts in self.directories or any(name.startswith(f"{path}/") for name in self.files)
        if path in self.files or is_folder or any("/".join(parts[:n]) in self.files for n in range(1, len(parts))):
            raise PathExistsError(f"{path!r} was saved or made already in the open checkpoint {self.tag!r}; the first one is kept")

    def add_file(self, path: str, saved: SavedFile) -> None:
        self.files[path] = saved
        self.metrics.saves.append(saved.metrics)
        if self.first_save_s is None:
            self.first_save_s = saved.started_s

    @property
    def guard_wait_s(self) -> float:
        """How long steps waited for the copies of its files."""
        return sum(saved.copy.guard_wait_s for saved in self.files.values() if saved.copy is not None)

    def timing(self) -> dict[str, float]:
        """What the manifest says of the time it took; once all files are synced."""
        if self.first_save_s is None:
            return {}
        stall_s = self.metrics.stall_s + self.guard_wait_s
        synced_s = max(saved.started_s + saved.metrics.durable_s for saved in self.files.values())
        return {"stall_s": round(stall_s, 6), "durable_s": round(synced_s - self.first_save_s, 6)}

    def add_directory(self, parts: tuple[str, ...]) -> bool:
        """Remember a directory and its parents; False when it was there."""
        if "/".join(parts) in self.files:
            raise PathExistsError(f"{'/'.join(parts)!r} is a file of the open checkpoint {self.tag!r}")
        is_new = bool(parts) and parts not in self.directories
        for n in range(1, len(parts) + 1):
            self.directories.add(parts[:n])
        return is_new


def given_up(message: str, reason: BaseException | None) -> TransactionStateError:
    """Why a checkpoint is given up. Other ranks learn nothing but this text, so it names the exception that has led to it."""
    if reason is None:
        return TransactionStateError(message)
    error = TransactionStateError(f"{message} because of {type(reason).__name__}: {reason}")
    error.__cause__ = reason
    return error


def joined(directory: Future[str], path: str) -> str | Future[str]:
    """`directory`/`path`; a future where the directory is not known yet."""
    if directory.done() and directory.exception() is None:
        return os.path.join(directory.result(), path)
    joined: Future[str] = Future()

    def on_done(known: Future[str]) -> None:
        error = known.exception()
        if error is None:
            joined.set_result(os.path.join(known.result(), path))
        else:
            joined.set_exception(error)

    directory.add_done_callback(on_done)
    return joined
