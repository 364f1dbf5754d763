"""Errors at step 0 instead of hour 20: what an engine tries before its first save."""

from __future__ import annotations

import contextlib
import logging
import os

from ..errors import CheckpointError, report
from ..format.manifest import Manifest
from ..host.facts import is_first_of_node
from ..ranks.coordinator import Coordinator
from ..reading.catalog import Catalog
from ..storage.filesystem import FileSystem
from ..storage.root import check_room, try_writing
from .config import EngineConfig


def at_start(config: EngineConfig, catalog: Catalog, filesystem: FileSystem, coordinator: Coordinator) -> None:
    """Sweep, then one real write on each node. Warns where another checkpoint like the newest one finds no room.

    Raises:
        WriteError, OutOfSpaceError: the disk refused it.
    """
    if config.sweep_on_start:
        coordinator.sweep()
    if not config.preflight or not (coordinator.leads or is_first_of_node()):
        return
    try_writing(filesystem, catalog.root)
    try:
        newest = _newest(catalog, filesystem) if coordinator.leads else None
        free_bytes = filesystem.free_bytes(catalog.root)
    except OSError as error:
        report(logging.INFO, "whether %r has room for another checkpoint cannot be told: %s", catalog.root, error)
        return
    size_bytes = sum(entry.size_bytes for entry in newest.files) if newest else 0
    if newest and size_bytes > free_bytes:
        told = "%d bytes are free in %r, where the newest checkpoint %r has %d: one like it cannot be saved"
        args = (free_bytes, catalog.root, newest.tag, size_bytes)
        report(logging.WARNING, told, *args, warning=RuntimeWarning, stacklevel=4)


def _newest(catalog: Catalog, filesystem: FileSystem) -> Manifest | None:
    """Of the checkpoint whose directory has changed last: of thousands, this manifest alone is read."""
    names = [name for name in filesystem.listdir(catalog.root) if not name.startswith(".")]
    changed_ns = {name: filesystem.stat(os.path.join(catalog.root, name)).mtime_ns for name in names}
    for name in sorted(names, key=changed_ns.__getitem__, reverse=True):
        with contextlib.suppress(CheckpointError):
            return catalog.manifest(name)
    return None


def for_states(config: EngineConfig, catalog: Catalog, filesystem: FileSystem, size_bytes: int) -> None:
    """Check that a checkpoint of that size finds room, and as many as retention will keep beside it; only the one where
    they may share blocks: how much is not known.

    Raises:
        OutOfSpaceError: the disk, or a quota, has less.
    """
    shares = config.reuse == "auto" and (filesystem.findings.clones or config.reuse_frozen is not None)
    num_kept = 0 if config.retention is None or shares else config.retention.num_kept
    if size_bytes:
        check_room(filesystem, catalog.root, size_bytes, max(1, num_kept + 1 - len(catalog.committed())))
