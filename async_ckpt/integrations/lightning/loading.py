"""Reads a `.ckpt` file back: verified against its manifest where it has one.

A file that was replaced by somebody else (another inode than the manifest's, and other bytes) is read as stock
Lightning reads it, with a warning; bytes that changed in the committed file itself are an error.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch

from ...catalog import Catalog
from ...errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from ...filesystem import FileSystem
from ...manifest import FileEntry
from ...restore.loading import load_opened
from ...restore.reading import VerifiedFile
from ...restore.verified_open import Opened
from .places import DATA_NAME, INODE_NAME, Place

logger = logging.getLogger("async_ckpt")


def load_file(filesystem: FileSystem, place: Place, *, map_location: Any, weights_only: bool | None, verify: str) -> Any:
    """The object in the file at `place`, a link followed. Blocks.

    Raises:
        CheckpointNotFoundError: there is no such file. CorruptCheckpointError: it is not as it was committed.
    """
    if verify not in ("full", "off"):
        raise ConfigError(f"verify must be 'full' or 'off', not {verify!r}")
    found = filesystem.stat(place.final)
    if found.kind == "other":
        place = Place(os.path.realpath(place.final))
        found = filesystem.stat(place.final)
    if found.kind != "file":
        raise CheckpointNotFoundError(f"Checkpoint file not found: {place.final}")
    entry = _entry(filesystem, place)
    if entry is None or verify == "off":
        return _load_unverified(place, map_location, weights_only)
    try:
        if found.size_bytes != entry.size_bytes:
            message = f"{place.final} has {found.size_bytes} bytes, {entry.size_bytes} were committed"
            raise CorruptCheckpointError(message, path=place.final)
        return _load_verified(filesystem, place, entry, map_location, weights_only)
    except CorruptCheckpointError as error:
        if _is_committed_file(filesystem, place, found.identity[1]):
            raise
        logger.warning("%s was replaced after this package wrote it, and is read without verification (%s)", place.final, error)
        return _load_unverified(place, map_location, weights_only)


def _entry(filesystem: FileSystem, place: Place) -> FileEntry | None:
    """The manifest's line for the file; None where there is no manifest.

    Raises:
        CorruptCheckpointError: the manifest itself is damaged.
    """
    if filesystem.stat(place.record).kind != "dir":
        return None
    if filesystem.stat(place.staged).kind == "file":
        # A crash came between the two renames: the manifest speaks of the file that is not here yet.
        logger.warning(
            "%s is older than its manifest, and is read without verification; the next save here brings the newer one", place.final
        )
        return None
    try:
        manifest = Catalog(place.root, filesystem).manifest(place.tag)
    except CheckpointNotFoundError:
        return None
    return manifest.file(DATA_NAME) if manifest.metadata.get("file") == place.name else None


def _load_verified(filesystem: FileSystem, place: Place, entry: FileEntry, map_location: Any, weights_only: bool | None) -> Any:
    file = filesystem.open_read(place.folder, (place.name,), direct=True)
    try:
        verified = VerifiedFile(file, name=place.final, extent_bytes=entry.extent_bytes, extent_crc32=entry.extent_crc32, check=True)
    except BaseException:
        file.close()
        raise
    with Opened(verified, entry, place.final, file.map_path) as opened:
        return load_opened(opened, map_location=map_location, weights_only=weights_only)


def _load_unverified(place: Place, map_location: Any, weights_only: bool | None) -> Any:
    return torch.load(place.final, map_location=map_location, weights_only=weights_only)


def _is_committed_file(filesystem: FileSystem, place: Place, inode: int) -> bool:
    try:
        return int(filesystem.read_file(os.path.join(place.record, INODE_NAME), 64)) == inode
    except (FileNotFoundError, ValueError):
        # Not known: then a difference must not pass in silence.
        return True
