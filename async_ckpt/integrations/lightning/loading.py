"""Reads a `.ckpt` file back: verified against its manifest where it has one, else against the checksums inside it.

Bytes that differ from the manifest are an error, wherever the folder was copied to. Only a file that somebody else put
there, whole by its own checksums, is read as stock Lightning reads it, with a warning. torch writes an id into each
file, made of its records' names and CRCs, and the manifest keeps it: a file with the same id, or with none that can be
read, is the committed one and damaged.
"""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from typing import Any

import torch

from ...errors import CheckpointNotFoundError, ConfigError, CorruptCheckpointError, report
from ...format.manifest import Manifest
from ...reading.catalog import Catalog
from ...reading.load import load_committed
from ...reading.records import LEGACY_MAGIC
from ...storage.filesystem import FileSystem
from .single_file import CONTENT_ID, DATA_NAME, CheckpointFile, read_content_id

# zipfile raises its own, zlib's and struct's errors, and plain ones.
_ZIP_ERRORS = (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError, EOFError, RuntimeError)


def load_file(filesystem: FileSystem, place: CheckpointFile, *, verify: str, **options: Any) -> Any:
    """The object in the file at `place`, a link followed. Blocks.

    Args:
        options: `map_location` and `weights_only`, as of ``torch.load``.

    Raises:
        CheckpointNotFoundError: there is no such file. CorruptCheckpointError: it is not as it was committed.
    """
    if verify not in ("full", "off"):
        raise ConfigError(f"verify must be 'full' or 'off', not {verify!r}")
    if filesystem.stat(place.final).kind == "other":
        place = CheckpointFile(os.path.realpath(place.final))
    if filesystem.stat(place.final).kind != "file":
        raise CheckpointNotFoundError(f"Checkpoint file not found: {place.final}")
    doubt = ""
    if verify == "full" and (manifest := _manifest(filesystem, place)) is not None:
        if filesystem.stat(place.staged).kind == "file":
            # A crash came between the two renames: the manifest speaks of the file that is not here yet.
            doubt = "is older than its manifest; the next save here ends that"
        else:
            try:
                return load_committed(Catalog(place.root, filesystem), place.tag, DATA_NAME, **options)
            except CorruptCheckpointError as error:
                if _is_the_committed_one(filesystem, place, manifest):
                    raise
                doubt = f"was replaced after this package wrote it ({error})"
    if verify == "full" and not check_own_crcs(place.final):
        doubt = doubt or "has no manifest"
        report(logging.WARNING, "%s %s, and holds no checksums: nothing could be compared", place.final, doubt)
    elif doubt:
        report(logging.WARNING, "%s %s; only its own checksums were compared", place.final, doubt)
    try:
        return torch.load(place.final, **options)
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        said = str(error).partition("\n")[0][:200]
        raise CorruptCheckpointError(f"{place.final} is no readable torch file: {said}", path=place.final) from error


def _manifest(filesystem: FileSystem, place: CheckpointFile) -> Manifest | None:
    """The manifest of the file; None where there is none. Raises CorruptCheckpointError: it is damaged itself."""
    with contextlib.suppress(CheckpointNotFoundError):
        manifest = Catalog(place.root, filesystem).manifest(place.tag)
        return manifest if manifest.metadata.get("file") == place.name else None
    return None


def _is_the_committed_one(filesystem: FileSystem, place: CheckpointFile, manifest: Manifest) -> bool:
    with contextlib.closing(filesystem.open_read(place.folder, (place.name,))) as file:
        content_id = read_content_id(file)
    return content_id is None or content_id == manifest.metadata.get(CONTENT_ID, content_id)


def check_own_crcs(path: str) -> bool:
    """Compare every record of a torch file with the CRC beside it. Blocks for the reading.

    Returns:
        False where there are none to compare: torch's old format has none, and torch can be told to write none.

    Raises:
        CorruptCheckpointError: one differs, or it is no torch file.
    """
    with open(path, "rb") as file:
        if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            return False
    try:
        with zipfile.ZipFile(path) as archive:
            if not any(record.CRC for record in archive.infolist()):
                return False
            bad = archive.testzip()
    except _ZIP_ERRORS as error:
        raise CorruptCheckpointError(f"{path} is no whole torch file: {error}", path=path) from error
    if bad is not None:
        raise CorruptCheckpointError(f"{path} is damaged in record {bad[:200]!a}", path=path, record=bad[:200])
    return True
