"""What an engine has to do with its mirrors, where it has some."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..errors import CheckpointError, CheckpointNotFoundError, ConfigError, MirrorError, report
from ..format.manifest import Manifest
from ..mirror.config import Mirror
from ..mirror.context import MirrorHooks
from ..mirror.mirrors import Mirrors
from ..mirror.pending import PendingMirror
from ..mirror.remote import remote_catalog
from ..ranks.coordinator import Coordinator
from ..ranks.exchange import MirrorAgreement
from ..ranks.rank_coordinator import RankCoordinator
from ..reading.catalog import Catalog
from ..retention import CheckpointInfo, RetentionPolicy, carry_out
from ..storage.filesystem import FileSystem
from .config import EngineConfig
from .pipeline import Callbacks


class EngineMirrors(Mirrors):
    """The mirrors of an engine, and how it reads from them. Any thread; `resume_from` and `latest` block for requests.

    Args:
        on_mirrored: called on a background thread when a checkpoint is in a mirror: older ones may be deletable now.
    """

    def __init__(
        self,
        config: EngineConfig,
        filesystem: FileSystem,
        root: str,
        coordinator: Coordinator,
        callbacks: Callbacks,
        on_mirrored: Callable[[], object],
    ) -> None:
        self._resumed: set[str] = set()
        self._better: dict[str, Catalog] = {}
        """Where `latest` has found a tag whole that the disk has not, or has damaged."""
        self._nodes: RankCoordinator | None = None
        """Of all ranks, where each node has a root of its own."""
        agreement, mirrors = None, tuple(config.mirrors)
        if isinstance(coordinator, RankCoordinator):
            info, agreement = coordinator.info, MirrorAgreement(coordinator.talk)
            # Each node has a root of its own: so it has a place of its own in the store.
            if info.num_nodes > 1:
                self._nodes = coordinator
                mirrors = tuple(replace(mirror, url=f"{mirror.url}/node-{info.node}") for mirror in mirrors)
        elif coordinator.world_size > 1:
            raise ConfigError(f"mirrors: {type(coordinator).__name__} cannot agree on them; use a RankCoordinator")
        super().__init__(
            mirrors,
            filesystem=filesystem,
            root=root,
            agreement=agreement,
            may_overwrite=config.overwrite == "replace",
            uploaders_per_node=config.uploaders_per_node,
            hooks=MirrorHooks(
                callbacks.on_span, partial(callbacks.tell, "on_mirror"), self._retain, on_mirrored, callbacks.run
            ),
        )

    def _retain(self, mirror: Mirror, catalog: Catalog, remove: Callable[[Manifest], object]) -> None:
        def hold(info: CheckpointInfo) -> str | None:
            return "the run resumed from it" if info.tag in self._resumed else None

        assert isinstance(mirror.retention, RetentionPolicy)
        carry_out(catalog, mirror.retention, remove, hold=hold)

    def expect(self, tag: str) -> PendingMirror:
        self._better.pop(tag, None)
        return super().expect(tag)

    def resume_from(self, tag: str, disk: Catalog) -> Catalog:
        """`disk` where that has the tag, unless `latest` has found it damaged there; else the first mirror that has it;
        `disk` where none has.

        The run loads from this checkpoint: no mirror's retention deletes it from now on.
        """
        self._resumed.add(tag)
        if tag in self._better:
            return self._better[tag]
        try:
            disk.path(tag)
            return disk
        except CheckpointNotFoundError:
            failure: MirrorError | None = None
            for remote in map(remote_catalog, self.mirrors):
                try:
                    remote.manifest(tag)
                    return remote
                except CheckpointNotFoundError:
                    continue
                except MirrorError as error:
                    failure = failure or error
            if failure is not None:
                raise failure from None
            return disk

    def latest(self, disk: Catalog, verify: str) -> str | None:
        """The newest tag, on disk or in a mirror, that verifies; a mirror that cannot be reached is left out, and
        that is logged. With several nodes the same on all, which must all ask."""
        if self._nodes is not None:
            tag, where = self._nodes.newest_on_all(verify, [remote_catalog(mirror) for mirror in self.mirrors])
            if tag is not None and where is not None:
                self._better[tag] = where
            return tag
        found = disk.latest(verify)
        newest_ns = disk.manifest(found).created_unix_ns if found is not None else -1
        for mirror in self.mirrors:
            remote = remote_catalog(mirror)
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
                report(logging.WARNING, "latest: %s is left out: %s", mirror.url, error)
        return found
