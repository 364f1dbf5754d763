"""Reads a `.ckpt` file back: verified against its manifest where it has one.

Bytes that differ from the manifest are an error, wherever the folder was copied to. Only a file that somebody else put
there, whole by its own checksums, is read as stock Lightning reads it, with a warning (see `content_id`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import torch

from ...errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, report
from ...format.manifest import FileEntry, Manifest
from ...reading.catalog import Catalog
from ...reading.load import load_opened
from ...reading.verified_file import VerifiedFile
from ...storage.filesystem import FileSystem
from .content_id import CONTENT_ID, check_own_crcs, read_content_id
from .places import DATA_NAME, CheckpointFile


def load_file(
    filesystem: FileSystem, place: CheckpointFile, *, map_location: Any, weights_only: bool | None, verify: str
) -> Any:
    """The object in the file at `place`, a link followed. Blocks.

    Raises:
        CheckpointNotFoundError: there is no such file. CorruptCheckpointError: it is not as it was committed.
    """
    if verify not in ("full", "off"):
        raise ConfigError(f"verify must be 'full' or 'off', not {verify!r}")
    found = filesystem.stat(place.final)
    if found.kind == "other":
        place = CheckpointFile(os.path.realpath(place.final))
        found = filesystem.stat(place.final)
    if found.kind != "file":
        raise CheckpointNotFoundError(f"Checkpoint file not found: {place.final}")
    manifest = None if verify == "off" else _manifest(filesystem, place)
    entry = None if manifest is None else manifest.file(DATA_NAME)
    if manifest is None or entry is None:
        return _load_unverified(place, map_location, weights_only)
    if filesystem.stat(place.staged).kind == "file":
        # A crash came between the two renames: the manifest speaks of the file that is not here yet.
        check_own_crcs(place.final)
        report(
            logging.WARNING,
            "%s is older than its manifest, and only its own checksums were compared; the next save here ends that",
            place.final,
        )
        return _load_unverified(place, map_location, weights_only)
    try:
        if found.size_bytes != entry.size_bytes:
            message = f"{place.final} has {found.size_bytes} bytes, {entry.size_bytes} were committed"
            raise CorruptCheckpointError(message, path=place.final)
        return _load_verified(filesystem, place, entry, map_location, weights_only)
    except CorruptCheckpointError as error:
        with contextlib.closing(filesystem.open_read(place.folder, (place.name,))) as file:
            content_id = read_content_id(file)
        if content_id is None or content_id == manifest.metadata.get(CONTENT_ID, content_id):
            raise
        check_own_crcs(place.final)
        report(
            logging.WARNING,
            "%s was replaced after this package wrote it; only its own checksums were compared (%s)",
            place.final,
            error,
        )
        return _load_unverified(place, map_location, weights_only)


def _manifest(filesystem: FileSystem, place: CheckpointFile) -> Manifest | None:
    """The manifest of the file; None where there is none.

    Raises:
        CorruptCheckpointError: the manifest itself is damaged.
    """
    if filesystem.stat(place.record).kind != "dir":
        return None
    try:
        manifest = Catalog(place.root, filesystem).manifest(place.tag)
    except CheckpointNotFoundError:
        return None
    return manifest if manifest.metadata.get("file") == place.name else None


def _load_verified(
    filesystem: FileSystem, place: CheckpointFile, entry: FileEntry, map_location: Any, weights_only: bool | None
) -> Any:
    file = filesystem.open_read(place.folder, (place.name,), direct=True)
    try:
        verified = VerifiedFile(file, entry, check=True)
    except BaseException:
        file.close()
        raise
    with verified:
        return load_opened(verified, map_location=map_location, weights_only=weights_only)


def _load_unverified(place: CheckpointFile, map_location: Any, weights_only: bool | None) -> Any:
    return torch.load(place.final, map_location=map_location, weights_only=weights_only)
