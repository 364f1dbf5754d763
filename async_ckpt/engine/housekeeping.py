"""What an engine does with its root besides writing into it: tries it before the first save, reads it and its mirrors,
and deletes what nobody wants any more.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..errors import CheckpointError, CheckpointNotFoundError, ConfigError, MirrorError, report
from ..format.manifest import Manifest
from ..host.facts import is_first_of_node
from ..mirror.config import Mirror
from ..mirror.context import MirrorHooks
from ..mirror.mirrors import Mirrors
from ..mirror.pending import PendingMirror
from ..mirror.remote import remote_catalog
from ..ranks.coordinator import Coordinator
from ..ranks.exchange import MirrorAgreement
from ..ranks.rank_coordinator import RankCoordinator
from ..reading.catalog import Catalog
from ..retention import CheckpointInfo, RetentionPolicy, apply, carry_out
from ..storage import transaction
from ..storage.filesystem import FileSystem
from ..storage.root import check_room, try_writing
from .config import EngineConfig
from .pipeline import Callbacks


class Housekeeping:
    """Errors at step 0 instead of hour 20; retention after commits. All but the constructor and `expect` blocks on the
    disk, and on requests where there are mirrors.
    """

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
        self.failures: list[BaseException] = []
        """That nobody was told of yet."""
        self.mirrors: Mirrors | None = None
        self._resumed: set[str] = set()
        self._better: dict[str, Catalog] = {}
        """Where `latest` has found a tag whole that the disk has not, or has damaged."""
        self._undeleted: set[str] = set()
        self._has_work = config.retention is not None or config.overwrite == "replace"
        """Whether there is, or may be, something to delete."""
        self._oldest_possible_ns: int | None = None

    # Before the first save.

    def start(self) -> None:
        """Sweep, then one real write on each node; then mirror. Warns where another checkpoint like the newest one
        finds no room. Raises WriteError, OutOfSpaceError: the disk refused it."""
        leads = self._coordinator.leads
        if self._config.sweep_on_start:
            self._coordinator.sweep()
        if self._config.preflight and (leads or is_first_of_node()):
            self._try_out(leads=leads)
        if self._config.mirrors:
            self.mirrors = self._start_mirrors()

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
        where they may share blocks: how much is not known. Raises OutOfSpaceError: the disk, or a quota, has less."""
        config = self._config
        shares = config.reuse == "auto" and (self._filesystem.findings.clones or config.reuse_frozen is not None)
        num_kept = 0 if config.retention is None or shares else config.retention.num_kept
        if size_bytes:
            num_more = max(1, num_kept + 1 - len(self._catalog.committed()))
            check_room(self._filesystem, self._root, size_bytes, num_more)

    # The mirrors.

    @property
    def _nodes(self) -> RankCoordinator | None:
        """All ranks, where each node has a root of its own."""
        ranks = self._coordinator
        return ranks if isinstance(ranks, RankCoordinator) and ranks.info.num_nodes > 1 else None

    def _start_mirrors(self) -> Mirrors:
        config, ranks, callbacks = self._config, self._coordinator, self._callbacks
        agreement, mirrors = None, tuple(config.mirrors)
        if isinstance(ranks, RankCoordinator):
            agreement = MirrorAgreement(ranks.talk)
        elif ranks.world_size > 1:
            raise ConfigError(f"mirrors: {type(ranks).__name__} cannot agree on them; use a RankCoordinator")
        if self._nodes is not None:
            # Each has a place of its own in the store too.
            node = self._nodes.info.node
            mirrors = tuple(replace(mirror, url=f"{mirror.url}/node-{node}") for mirror in mirrors)
        on_ended = partial(callbacks.tell, "on_mirror")
        return Mirrors(
            mirrors,
            filesystem=self._filesystem,
            root=self._root,
            agreement=agreement,
            may_overwrite=config.overwrite == "replace",
            uploaders_per_node=config.uploaders_per_node,
            hooks=MirrorHooks(callbacks.on_span, on_ended, self._retain, self.rotate, callbacks.run),
        )

    def _retain(self, mirror: Mirror, catalog: Catalog, remove: Callable[[Manifest], object]) -> None:
        def hold(info: CheckpointInfo) -> str | None:
            return "the run resumed from it" if info.tag in self._resumed else None

        assert isinstance(mirror.retention, RetentionPolicy)
        carry_out(catalog, mirror.retention, remove, hold=hold)

    def expect(self, tag: str) -> PendingMirror | None:
        """A commit of `tag` was called: what will be told of its mirrors, where there are some."""
        self._better.pop(tag, None)
        return None if self.mirrors is None else self.mirrors.expect(tag)

    def catalog_of(self, tag: str) -> Catalog:
        """The disk where that has the tag, unless `latest` has found it damaged there; else the first mirror that has
        it; the disk where none has. The run loads from this checkpoint: no mirror's retention deletes it from now on.
        """
        self._resumed.add(tag)
        if self.mirrors is None or tag in self._better:
            return self._better.get(tag, self._catalog)
        try:
            self._catalog.path(tag)
        except CheckpointNotFoundError:
            failure: MirrorError | None = None
            for remote in map(remote_catalog, self.mirrors.mirrors):
                try:
                    remote.manifest(tag)
                    return remote
                except CheckpointNotFoundError:
                    continue
                except MirrorError as error:
                    failure = failure or error
            if failure is not None:
                raise failure from None
        return self._catalog

    def latest(self, verify: str, tier: str) -> str | None:
        """The newest tag that verifies, on the disk, or with tier "any" in a mirror too; one that cannot be reached is
        left out, and that is logged. With several nodes the same on all, which must all ask.
        """
        if tier == "disk" or self.mirrors is None:
            return self._catalog.latest(verify)
        remotes = [remote_catalog(mirror) for mirror in self.mirrors.mirrors]
        if self._nodes is not None:
            found, where = self._nodes.newest_on_all(verify, remotes)
            if found is not None and where is not None:
                self._better[found] = where
            return found
        found = self._catalog.latest(verify)
        newest_ns = self._catalog.manifest(found).created_unix_ns if found is not None else -1
        for remote in remotes:
            try:
                for entry in reversed(remote.entries()):
                    if entry.manifest is None or entry.manifest.created_unix_ns <= newest_ns:
                        continue
                    if remote.verify(entry.tag, level=verify).ok:
                        found, newest_ns = entry.tag, entry.manifest.created_unix_ns
                        self._better[found] = remote
                        break
            except CheckpointError as error:
                if found is None:
                    raise
                report(logging.WARNING, "latest: %s is left out: %s", remote.root, error)
        return found

    # Beside what is there.

    def after_older(self, created_unix_ns: int, first_unix_ns: int) -> int:
        """A later time than that of every checkpoint in the root, also when the clock was set back between two runs.
        `first_unix_ns`: of the first commit of this engine."""
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
            failure = ConfigError(f"{told}; the new checkpoint is committed")
            failure.__cause__ = error
            self.failures.append(failure)
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
