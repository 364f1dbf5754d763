"""What must come after a commit, in the order Lightning asked for it: hooks, links, deletions. One background thread.

Guarantees:
- A file is deleted only after every save that was asked for before has been committed; if one of those failed, the file
  stays.
- A link is switched, in one rename, only after its target was committed; a file that a link still points to is deleted
  after the link has moved on, or at the end.
- `on_commit` sees a file that is complete and durable, and that is not deleted before it returns.
- Every failure is raised once: by `raise_failure`, or a commit's by the engine where that comes first.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future

from ...engine.engine import AsyncCheckpointEngine
from ...engine.pending import PendingCommit
from ...errors import report
from ...storage.filesystem import FileSystem
from ...storage.private_dirs import replacing
from ...threads.executor import DaemonExecutor
from ...threads.outcome import wait_all
from .single_file import CheckpointFile, FileCoordinator, remove


class FollowUps:
    """What follows the commits of one engine. Calls come from the training thread; the work is done on its own, in the
    order of the calls: whatever was called after `saved` finds that commit ended."""

    def __init__(
        self,
        engine: AsyncCheckpointEngine,
        filesystem: FileSystem,
        coordinator: FileCoordinator,
        on_commit: Callable[[str], object] | None,
    ) -> None:
        self.engine = engine
        self.coordinator = coordinator
        self._filesystem = filesystem
        self._on_commit = on_commit
        # Each path and its commit, until that has ended well.
        self._commits: list[tuple[str, PendingCommit]] = []
        # By path, the removal that counts: none where a save came later.
        self._removals: dict[str, object] = {}
        self._postponed: list[tuple[CheckpointFile, object]] = []
        self._undeleted: set[str] = set()
        self._failures: deque[Exception] = deque()
        self._worker = DaemonExecutor("async-ckpt-lightning", 1)

    # The training thread.

    def saving(self, place: CheckpointFile) -> None:
        """A save of `place` begins now: an older removal of the same path no longer applies."""
        self._removals.pop(place.final, None)

    def saved(self, place: CheckpointFile, pending: PendingCommit) -> None:
        """Follow this commit."""
        self._commits = [known for known in self._commits if not known[1].done() or known[1].failure() is not None]
        self._commits.append((place.final, pending))
        self._later(lambda: self._ended(place, pending))

    def remove(self, place: CheckpointFile) -> None:
        """Delete a file once everything that was saved before is committed."""
        self._removals[place.final] = removal = object()
        before = self.engine.pending()
        self._later(lambda: self._remove(place, removal, before))

    def link(self, target: CheckpointFile, link: CheckpointFile) -> None:
        """Point a symbolic link at `target` once that is committed."""
        newest = self.newest(target)
        self._later(lambda: self._link(target, link, newest))

    def newest(self, place: CheckpointFile) -> PendingCommit | None:
        """The last commit of this path, if it has not ended well long ago."""
        return next((pending for path, pending in reversed(self._commits) if path == place.final), None)

    def is_pending(self, place: CheckpointFile) -> bool:
        """Whether a save to this path is on its way. Never blocks."""
        newest = self.newest(place)
        return newest is not None and not newest.done() and place.final not in self._removals

    def raise_failure(self) -> None:
        """Raise the oldest failure that was not raised yet, if there is one. Never blocks."""
        for _, pending in self._commits:
            if pending.is_owed and (loss := pending.loss()) is not None:
                raise loss
        if self._failures:
            raise self._failures.popleft()

    def drain(self) -> None:
        """Block until all commits have ended and everything that follows them is done."""
        self._later(lambda: self._retry_postponed(force=True)).result()

    def close(self) -> None:
        """`drain`, and stop all threads. Raises CheckpointError: the first failed commit that was not raised yet."""
        try:
            self.drain()
            self._worker.shutdown()
        finally:
            self.engine.close()

    def _later(self, work: Callable[[], None]) -> Future[None]:
        return self._worker.submit(self._noting, work)

    # The worker thread.

    def _noting(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # noqa: BLE001 - also a user's hook may fail in any way; the next save raises it
            self._failures.append(error)
            report(logging.ERROR, "after a checkpoint was committed: %s", error)

    def _ended(self, place: CheckpointFile, pending: PendingCommit) -> None:
        pending.wait()
        is_there = pending.failure() is None and self._filesystem.stat(place.final).kind == "file"
        if is_there and self._on_commit is not None:
            self._on_commit(place.final)
        self._retry_postponed(force=False)

    def _link(self, target: CheckpointFile, link: CheckpointFile, pending: PendingCommit | None) -> None:
        if pending is not None and pending.failure() is not None:
            report(logging.WARNING, "%s still points where it did: %s was not committed", link.final, target.final)
            return
        switch_link(self._filesystem, target, link)
        self._retry_postponed(force=False)

    def _remove(self, place: CheckpointFile, removal: object, before: list[PendingCommit]) -> None:
        wait_all(before)
        failed = next((pending for pending in before if pending.failure() is not None), None)
        if failed is not None:
            message = "%s is kept: the save of %r, which was to replace it, failed"
            report(logging.WARNING, message, place.final, failed.tag)
            return
        self._postponed.append((place, removal))
        self._retry_postponed(force=False)

    def _retry_postponed(self, *, force: bool) -> None:
        postponed, self._postponed = self._postponed, []
        for place, removal in postponed:
            if not force and _is_linked(place):
                self._postponed.append((place, removal))
                continue
            try:
                with self.coordinator.lock:
                    if self._removals.get(place.final) is removal:
                        remove(self._filesystem, place)
            except OSError as error:
                # A file that cannot be deleted ends no training.
                self._postponed.append((place, removal))
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
    with replacing(filesystem, link.final, temporary):
        os.symlink(os.path.relpath(target.final, link.folder), temporary)
        if filesystem.stat(link.final).kind == "dir":
            shutil.rmtree(link.final)
