"""What an engine does with its root besides writing into it: tries it before the first save, mirrors it, and deletes
what nobody wants any more.
"""

from __future__ import annotations

import contextlib
import logging
import os

from ..errors import CheckpointError, ConfigError, report
from ..format.manifest import Manifest
from ..host.facts import is_first_of_node
from ..ranks.coordinator import Coordinator
from ..reading.catalog import Catalog
from ..retention import CheckpointInfo, apply
from ..storage import transaction
from ..storage.filesystem import FileSystem
from ..storage.root import check_room, try_writing
from .config import EngineConfig
from .mirroring import EngineMirrors
from .pipeline import Callbacks


class Housekeeping:
    """Errors at step 0 instead of hour 20; retention after commits. All but the constructor blocks on the disk."""

    def __init__(
        self,
        config: EngineConfig,
        filesystem: FileSystem,
        catalog: Catalog,
        coordinator: Coordinator,
        callbacks: Callbacks,
    ) -> None:
        self._config, self._filesystem, self._catalog, self._coordinator = config, filesystem, catalog, coordinator
        self._callbacks, self._root = callbacks, catalog.root
        self.mirrors: EngineMirrors | None = None
        self.failures: list[BaseException] = []
        """That nobody was told of yet."""
        self._undeleted: set[str] = set()
        self._has_work = config.retention is not None or config.overwrite == "replace"
        """Whether there is, or may be, something to delete."""
        self._oldest_possible_ns: int | None = None

    # Before the first save.

    def start(self) -> None:
        """Sweep, then one real write on each node; then mirror. Warns where another checkpoint like the newest one
        finds no room.

        Raises:
            WriteError, OutOfSpaceError: the disk refused it.
        """
        config, leads = self._config, self._coordinator.leads
        if config.sweep_on_start:
            self._coordinator.sweep()
        if config.preflight and (leads or is_first_of_node()):
            self._try_out(leads=leads)
        if config.mirrors:
            how = self._filesystem, self._root, self._coordinator, self._callbacks
            self.mirrors = EngineMirrors(config, *how, on_mirrored=self.rotate)

    def _try_out(self, *, leads: bool) -> None:
        try_writing(self._filesystem, self._root)
        try:
            newest = self._newest() if leads else None
            free_bytes = self._filesystem.free_bytes(self._root)
        except OSError as error:
            report(logging.INFO, "whether %r has room for another checkpoint cannot be told: %s", self._root, error)
            return
        size_bytes = sum(entry.size_bytes for entry in newest.files) if newest else 0
        if newest and size_bytes > free_bytes:
            told = "%d bytes are free in %r, where the newest checkpoint %r has %d: one like it cannot be saved"
            args = (free_bytes, self._root, newest.tag, size_bytes)
            report(logging.WARNING, told, *args, warning=RuntimeWarning, stacklevel=5)

    def _newest(self) -> Manifest | None:
        """Of the checkpoint whose directory has changed last: of thousands, this manifest alone is read."""
        names = [name for name in self._filesystem.listdir(self._root) if not name.startswith(".")]
        changed_ns = {name: self._filesystem.stat(os.path.join(self._root, name)).mtime_ns for name in names}
        for name in sorted(names, key=changed_ns.__getitem__, reverse=True):
            with contextlib.suppress(CheckpointError):
                return self._catalog.manifest(name)
        return None

    def check_room(self, size_bytes: int) -> None:
        """Check that a checkpoint of that size finds room, and as many as retention will keep beside it; only the one
        where they may share blocks: how much is not known.

        Raises:
            OutOfSpaceError: the disk, or a quota, has less.
        """
        config = self._config
        shares = config.reuse == "auto" and (self._filesystem.findings.clones or config.reuse_frozen is not None)
        num_kept = 0 if config.retention is None or shares else config.retention.num_kept
        if size_bytes:
            num_more = max(1, num_kept + 1 - len(self._catalog.committed()))
            check_room(self._filesystem, self._root, size_bytes, num_more)

    # Beside what is there.

    def after_older(self, created_unix_ns: int, first_unix_ns: int) -> int:
        """A later time than that of every checkpoint in the root, also when the clock was set back between two runs.

        Args:
            first_unix_ns: of the first commit of this engine.
        """
        if self._oldest_possible_ns is None:
            try:
                entries = self._catalog.entries()
            except OSError as error:
                # Only the order after a clock that was set back is at stake; the next commit looks again.
                told = "the times of older checkpoints in %r cannot be read, this clock is trusted: %s"
                self._callbacks.report(logging.WARNING, told, self._root, error)
                return created_unix_ns
            times = (entry.manifest.created_unix_ns + 1 for entry in entries if entry.manifest)
            self._oldest_possible_ns = max(times, default=0)
        return created_unix_ns + max(0, self._oldest_possible_ns - first_unix_ns)

    def delete(self, tag: str) -> None:
        """Delete a committed checkpoint, on the rank that leads."""
        if self._coordinator.leads:
            self._has_work = True
            transaction.remove(self._filesystem, self._root, tag)

    def rotate(self) -> int:
        """Delete, on the rank that leads, what was replaced or could not be deleted before, then what the policy does
        not keep. What the disk will not delete is told once, and tried again after each commit.

        Returns how many could not be deleted: that is the end of no training. Where the policy cannot judge these
        checkpoints, or raises, nothing is deleted, and that is one of the `failures`: the new checkpoint is durable.
        """
        if not self._coordinator.leads or not self._has_work:
            return 0
        policy, failures = self._config.retention, dict[str, object]()
        try:
            swept = transaction.sweep(self._filesystem, self._root, only_own=True)
            failures.update({left.tag: left.reason for left in swept if left.action == "left"})
            decisions = [] if policy is None else apply(self._filesystem, self._root, policy, self._why_held)
            failures.update({decision.tag: decision.failure for decision in decisions if decision.failure is not None})
        except OSError as error:
            failures[os.path.basename(self._root)] = error
        except CheckpointError as error:
            self.failures.append(error)
            return 0
        except BaseException as error:  # noqa: BLE001 -- SystemExit would end the writer
            told = f"the retention policy raised {error!r}: nothing is deleted in {self._root!r}"
            self.failures.append(ConfigError(f"{told}; the new checkpoint is committed"))
            self.failures[-1].__cause__ = error
            return 0
        new, self._undeleted = failures.keys() - self._undeleted, set(failures)
        if new:
            told = "%d old checkpoint(s) in %r cannot be deleted now, such as %r (%s); tried again after each commit"
            about = len(failures), self._root, min(new), failures[min(new)]
            self._callbacks.report(logging.WARNING, told, *about)
        return len(failures)

    def _why_held(self, info: CheckpointInfo) -> str | None:
        """What not all mirrors have had stays, where the configuration says so."""
        waits = self._config.mirrors and self._config.keep_local_until_mirrored
        is_mirrored = self.mirrors is not None and self.mirrors.is_mirrored(info.tag, info.created_unix_ns)
        return "it is not mirrored yet" if waits and not is_mirrored else None
