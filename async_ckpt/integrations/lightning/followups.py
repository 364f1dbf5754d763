"""What must come after a commit, in the order Lightning asked for it: hooks, links, deletions. One background thread.

Guarantees:
- A file is deleted only after every save that was asked for before has been committed; if one of those failed, the file
  stays.
- A link is switched, in one rename, only after its target was committed; a file that a link still points to is deleted
  after the link has moved on, or at the end.
- `on_commit` sees a file that is complete and durable, and that is not deleted before it returns.
- Every failure is kept until `take_failure` hands it out, once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from ...engine.engine import AsyncCheckpointEngine
from ...engine.pending import PendingCommit
from ...errors import report
from ...storage.filesystem import FileSystem
from ...threads.executor import DaemonExecutor
from ...threads.locks import Lock
from .single_file import CheckpointFile, FileCoordinator, remove


@dataclass(slots=True)
class _Save:
    place: CheckpointFile
    pending: PendingCommit
    raised: bool = False

    @property
    def loss(self) -> BaseException | None:
        """What is to be raised for that, if anything is. Never blocks."""
        return self.pending.loss() if self.pending.done() else None

    @property
    def failure(self) -> BaseException | None:
        """Why it failed, if it has ended and failed. Never blocks."""
        return self.pending.exception() if self.pending.done() else None


class FollowUps:
    """What follows the commits of one engine. Calls come from the training thread, the work is done on its own
    thread."""

    def __init__(
        self,
        engine: AsyncCheckpointEngine,
        filesystem: FileSystem,
        coordinator: FileCoordinator,
        on_commit: Callable[[str], object] | None,
    ) -> None:
        self.engine = engine
        self._filesystem = filesystem
        self.coordinator = coordinator
        self._on_commit = on_commit
        self._saves: list[_Save] = []
        # Saves and removals by number, the newest of each path: what came later counts.
        self._count = 0
        self._saved: dict[str, int] = {}
        self._removed: dict[str, int] = {}
        self._postponed: list[tuple[CheckpointFile, int]] = []
        self._undeleted: set[str] = set()
        self._failures: list[BaseException] = []
        self._lock = Lock()
        self._worker = DaemonExecutor("async-ckpt-lightning", 1)

    # The training thread.

    def saving(self, place: CheckpointFile) -> None:
        """A save of `place` begins now: an older removal of the same path no longer applies."""
        self._count += 1
        self._saved[place.final] = self._count

    def saved(self, place: CheckpointFile, pending: PendingCommit) -> None:
        """Follow this commit."""
        save = _Save(place, pending)
        with self._lock:
            self._saves.append(save)
        self._worker.submit(self._noting, lambda: self._ended(save))

    def remove(self, place: CheckpointFile) -> None:
        """Delete a file once everything that was saved before is committed."""
        self._count += 1
        self._removed[place.final] = number = self._count
        before = self._unended()
        self._worker.submit(self._noting, lambda: self._remove(place, number, before))

    def link(self, target: CheckpointFile, link: CheckpointFile) -> None:
        """Point a symbolic link at `target` once that is committed."""
        waits = [save for save in self._unended() if save.place == target]
        self._worker.submit(self._noting, lambda: self._link(target, link, waits))

    def is_pending(self, place: CheckpointFile) -> bool:
        """Whether a save to this path has not ended, and no removal was asked for since."""
        is_newer = self._saved.get(place.final, 0) > self._removed.get(place.final, 0)
        return is_newer and any(save.place == place for save in self._unended())

    def failure_of(self, place: CheckpointFile) -> BaseException | None:
        """Why the newest save to this path failed, if it has."""
        with self._lock:
            mine = [save for save in self._saves if save.place == place]
        return mine[-1].failure if mine else None

    def take_failure(self) -> BaseException | None:
        """The oldest failure that was not handed out yet. Never blocks."""
        with self._lock:
            for save in self._saves:
                if not save.raised and save.loss is not None:
                    save.raised = True
                    return save.loss
            return self._failures.pop(0) if self._failures else None

    def forget(self, error: BaseException) -> None:
        """Somebody else has raised this failure."""
        with self._lock:
            for save in self._saves:
                save.raised = save.raised or save.loss is error

    def drain(self) -> None:
        """Block until all commits have ended and everything that follows them is done."""
        for save in self._unended():
            save.pending.exception()
        self._worker.submit(self._noting, lambda: self._retry_postponed(force=True)).result()

    def close(self) -> None:
        """`drain`, and stop all threads."""
        try:
            self.drain()
            self._worker.shutdown()
        finally:
            self.engine.close()

    def _unended(self) -> list[_Save]:
        with self._lock:
            # What has ended well needs no memory.
            self._saves = [save for save in self._saves if not save.pending.done() or save.failure is not None]
            return [save for save in self._saves if not save.pending.done()]

    # The worker thread.

    def _noting(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - also a user's hook may fail in any way; the next save raises it
            with self._lock:
                self._failures.append(error)
            report(logging.ERROR, "after a checkpoint was committed: %s", error)

    def _ended(self, save: _Save) -> None:
        # Waits for it.
        failure = save.pending.exception()
        if failure is None and self._on_commit is not None and self._filesystem.stat(save.place.final).kind == "file":
            self._on_commit(save.place.final)
        self._retry_postponed(force=False)

    def _link(self, target: CheckpointFile, link: CheckpointFile, waits: list[_Save]) -> None:
        if any(save.pending.exception() is not None for save in waits):
            report(logging.WARNING, "%s still points where it did: %s was not committed", link.final, target.final)
            return
        switch_link(self._filesystem, target, link)
        self._retry_postponed(force=False)

    def _remove(self, place: CheckpointFile, number: int, before: list[_Save]) -> None:
        failed = next((save for save in before if save.pending.exception() is not None), None)
        if failed is not None:
            message = "%s is kept: the save of %s, which was to replace it, failed"
            report(logging.WARNING, message, place.final, failed.place.final)
            return
        self._postponed.append((place, number))
        self._retry_postponed(force=False)

    def _retry_postponed(self, *, force: bool) -> None:
        postponed, self._postponed = self._postponed, []
        for place, number in postponed:
            if not force and _is_linked(place):
                self._postponed.append((place, number))
                continue
            try:
                with self.coordinator.lock:
                    if self._saved.get(place.final, 0) < number:
                        remove(self._filesystem, place)
            except OSError as error:
                # A file that cannot be deleted ends no training.
                self._postponed.append((place, number))
                if place.final not in self._undeleted:
                    self._undeleted.add(place.final)
                    message = "%s cannot be deleted now; tried again after each save: %s"
                    report(logging.WARNING, message, place.final, error)


def _is_linked(place: CheckpointFile) -> bool:
    with contextlib.suppress(FileNotFoundError), os.scandir(place.folder) as entries:
        return any(entry.is_symlink() and os.readlink(entry.path) in (place.name, place.final) for entry in entries)
    return False


def switch_link(filesystem: FileSystem, target: CheckpointFile, link: CheckpointFile) -> None:
    """Make `link` a relative symbolic link to `target`, in one rename; blocks.

    Raises:
        OSError: the disk refused; the old link is as it was.
    """
    if target == link:
        return
    # Two links may be switched at once by different processes.
    temporary = os.path.join(link.folder, f".{link.name}.{os.getpid()}.link")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.symlink(os.path.relpath(target.final, link.folder), temporary)
    if filesystem.stat(link.final).kind == "dir":
        shutil.rmtree(link.final)
    os.replace(temporary, link.final)
    filesystem.fsync_dir(link.folder)
