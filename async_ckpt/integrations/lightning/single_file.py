"""One `.ckpt` file: where it belongs; its commit: the core's into the hidden folder, then one rename to the path that
Lightning chose; and its reading.

    <dirpath>/epoch=3.ckpt                            the checkpoint: one plain torch file, its only name
    <dirpath>/.async_ckpt/epoch=3.ckpt/manifest.json  its sizes and CRCs
    <dirpath>/.async_ckpt/.staging...                 in flight

Deleting a `.ckpt` by hand frees its space; the next run removes the left-over manifest.

Guarantees:
- At its final path a file is the old one, the new one, or absent; the new one only once it and its manifest are
  durable.
- A crash between the two renames loses nothing: the next run on that folder makes the second one (`settle`).
- A publish and a removal of the same folder never overlap.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import zipfile
from dataclasses import replace
from typing import Any

import torch

from ...errors import CheckpointNotFoundError, CommitError, ConfigError, CorruptCheckpointError, report
from ...format.manifest import FileEntry, Manifest
from ...format.names import SINGLE_FILES_NAME, single_file_tag
from ...format.zip_directory import UnusualLayoutError, read_directory
from ...ranks.coordinator import LocalCoordinator
from ...reading.catalog import Catalog
from ...reading.load import load_committed, load_opened
from ...reading.records import LEGACY_MAGIC
from ...reading.verified_file import VerifiedFile
from ...storage import transaction
from ...storage.filesystem import FileSystem
from ...storage.staged import Destination, Staging
from ...threads.locks import Lock

DATA_NAME = "state.ckpt"
_CONTENT_ID = "content_id"
"""Metadata: torch's id of the committed file."""
_EXTENT_BYTES = 8 << 20
_ID_RECORD = ".data/serialization_id"
# zipfile raises its own, zlib's and struct's errors, and plain ones.
_ZIP_ERRORS = (zipfile.BadZipFile, zipfile.LargeZipFile, OSError, ValueError, EOFError, RuntimeError)


class CheckpointFile(Destination):
    """The checkpoint at the absolute path `final`. `root` holds its folder's manifests and staging directories; `tag`
    is the file's name, or a digest of it."""

    final: str

    def __init__(self, final: str) -> None:
        folder, name = os.path.split(final)
        super().__init__(os.path.join(folder, SINGLE_FILES_NAME), single_file_tag(name))
        object.__setattr__(self, "final", final)

    @classmethod
    def of(cls, path: Any) -> CheckpointFile:
        """From what Lightning passes. Raises ConfigError: a URL; only local paths can be committed by a rename."""
        text = os.fspath(path).removeprefix("file://")
        if "://" in text:
            raise ConfigError(
                f"AsyncCkptIO writes to local or mounted file systems only, not to {text!r}; use Lightning's own "
                "plugin there"
            )
        return cls(os.path.abspath(text))

    @property
    def folder(self) -> str:
        return os.path.dirname(self.final)

    @property
    def name(self) -> str:
        return os.path.basename(self.final)

    @property
    def record(self) -> str:
        """The directory that holds the manifest."""
        return os.path.join(self.root, self.tag)

    @property
    def staged(self) -> str:
        """The file's name between its commit and its move to `final`."""
        return os.path.join(self.record, DATA_NAME)


class FileCoordinator(LocalCoordinator):
    """A single process whose checkpoints are files in any folder, at a `CheckpointFile` each."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = Lock()
        self._sweeps = False
        self._settled: set[str] = set()

    def prepare(self, place: CheckpointFile) -> None:
        """Make and tidy the folder when it is used first. Training thread."""
        if place.root not in self._settled:
            transaction.make_root(self._fs, place.root)
            if self._sweeps:
                transaction.sweep(self._fs, place.root)
            with self.lock:
                settle(self._fs, place.folder)
            self._settled.add(place.root)

    def begin(self, destination: Destination, overwrite: str) -> Staging:
        assert isinstance(destination, CheckpointFile)
        self.prepare(destination)
        return super().begin(destination, overwrite)

    def publish(self, staging: Staging, part: Manifest) -> None:
        place = staging.destination
        assert isinstance(place, CheckpointFile)
        try:
            marks = {_CONTENT_ID: _content_id(self._fs, staging.path, DATA_NAME)}
        except OSError as error:
            told = f"the written file in {staging.path!r} cannot be read ({error}); what was there before is unchanged"
            raise CommitError(told, step="read", errno=error.errno, path=staging.path) from error
        with self.lock:
            super().publish(staging, replace(part, metadata={**part.metadata, **marks}))
            _move_into_place(self._fs, place)

    def sweep(self) -> None:
        # Each folder is swept when it is first used.
        self._sweeps = True


def _content_id(fs: FileSystem, folder: str, name: str) -> str | None:
    """torch's id of a file's content; None where it has none, or is cut or laid out in another way. Three reads."""
    with contextlib.closing(fs.open_read(folder, (name,))) as file:
        try:
            record = read_directory(file.read, file.size_bytes).get(_ID_RECORD)
        except (CorruptCheckpointError, UnusualLayoutError):
            return None
        if record is None or not 0 < record.num_bytes <= 256:
            return None
        return file.read(record.offset, record.num_bytes).decode("ascii", "replace")


def _move_into_place(fs: FileSystem, place: CheckpointFile) -> None:
    """The second rename of a commit, made durable. Raises CommitError: the next run on this folder makes it."""
    try:
        identity = fs.stat(place.staged).identity
        try:
            fs.rename(place.staged, place.final)
        except FileNotFoundError:
            # Another process that started on this folder has moved it.
            if fs.stat(place.final).identity != identity:
                raise
        fs.fsync_dir(place.folder)
    except OSError as error:
        raise CommitError(
            f"the checkpoint is complete at {place.staged!r} but could not be moved to {place.final!r} ({error}); "
            "what was there before is unchanged, and the next run on this folder moves it",
            step="move",
            errno=error.errno,
            path=place.final,
            committed=None,
        ) from error


def settle(fs: FileSystem, folder: str) -> None:
    """Finish what a crash left between the two renames, and drop manifests whose file is gone. Blocks. Raises
    CommitError: a file could not be moved."""
    catalog = Catalog(os.path.join(folder, SINGLE_FILES_NAME), fs)
    for entry in catalog.entries():
        name = entry.manifest.metadata.get("file") if entry.manifest is not None else None
        if not isinstance(name, str) or "/" in name:
            continue
        place = CheckpointFile(os.path.join(folder, name))
        if place.tag != entry.tag:
            continue
        staged, final = fs.stat(place.staged), fs.stat(place.final)
        if staged.kind == "file" and (final.kind == "missing" or final.mtime_ns <= staged.mtime_ns):
            report(
                logging.WARNING,
                "%s was committed by a process that ended before it was in place; it is moved there now",
                place.final,
            )
            _move_into_place(fs, place)
        elif staged.kind == "file" or final.kind == "missing":
            _forget(fs, place)


def _forget(fs: FileSystem, place: CheckpointFile) -> None:
    """Remove a file's manifest; one that has none is fine."""
    with contextlib.suppress(CheckpointNotFoundError):
        transaction.remove(fs, place.root, place.tag)


def remove(fs: FileSystem, place: CheckpointFile) -> None:
    """Delete a checkpoint file, then its manifest; a directory that some other plugin wrote is deleted too. Blocks.
    Raises OSError, CheckpointError: the disk refused."""
    kind = fs.stat(place.final).kind
    if kind == "dir":
        shutil.rmtree(place.final)
    elif kind != "missing":
        fs.unlink(place.final)
    if kind != "missing":
        fs.fsync_dir(place.folder)
    _forget(fs, place)


def load_file(filesystem: FileSystem, place: CheckpointFile, *, verify: str, **options: Any) -> Any:
    """The object in the file at `place`, a link followed, verified ("full") or not ("off"). `options`: `map_location`
    and `weights_only`, as of ``torch.load``. Blocks.

    Bytes that differ from the manifest are an error, wherever the folder was copied to. Only a file that somebody else
    put there, whole by its own checksums, is read as stock Lightning reads it, with a warning. torch writes an id into
    each file, made of its records' names and CRCs, and the manifest keeps it: a file with the same id, or with none
    that can be read, is the committed one and damaged.

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
                content_id = _content_id(filesystem, place.folder, place.name)
                if content_id in (None, manifest.metadata.get(_CONTENT_ID, content_id)):
                    raise
                doubt = f"was replaced after this package wrote it ({error})"
    if verify == "full" and not _check_own_crcs(place.final):
        doubt = doubt or "has no manifest"
        report(logging.WARNING, "%s %s, and holds no checksums: nothing could be compared", place.final, doubt)
    elif doubt:
        report(logging.WARNING, "%s %s; only its own checksums were compared", place.final, doubt)
    return _load_unlisted(filesystem, place, verify, **options)


def _load_unlisted(fs: FileSystem, place: CheckpointFile, verify: str, **options: Any) -> Any:
    """The object in a file of which no manifest tells, with the limits and the errors of one that is listed; another
    zip archive than ``torch.save`` makes is left to ``torch.load``."""
    size = fs.stat(place.final).size_bytes
    # An extent is what is kept in memory beside the tensors.
    entry = FileEntry(DATA_NAME, size, max(1, min(size, _EXTENT_BYTES)), (), "torch", "torch", None)
    try:
        with (
            contextlib.closing(fs.open_read(place.folder, (place.name,), direct=True)) as file,
            VerifiedFile(file, entry, check=False) as opened,
        ):
            return load_opened(opened, **options)
    except CorruptCheckpointError:
        if not _has_another_layout(fs, place):
            raise
    if verify == "full":
        report(logging.WARNING, "%s is not laid out as torch.save does it: torch.load reads it unverified", place.final)
    try:
        return torch.load(place.final, **options)
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        said = str(error).partition("\n")[0][:200]
        raise CorruptCheckpointError(f"{place.final} is no readable torch file: {said}", path=place.final) from error


def _has_another_layout(fs: FileSystem, place: CheckpointFile) -> bool:
    """Whether it is a zip archive that is not damaged, but that something else than torch has put together."""
    with contextlib.closing(fs.open_read(place.folder, (place.name,))) as file:
        try:
            read_directory(file.read, file.size_bytes)
        except UnusualLayoutError:
            return True
        except CorruptCheckpointError:
            return False
    return False


def _manifest(filesystem: FileSystem, place: CheckpointFile) -> Manifest | None:
    """The manifest of the file; None where there is none. Raises CorruptCheckpointError: it is damaged itself."""
    with contextlib.suppress(CheckpointNotFoundError):
        manifest = Catalog(place.root, filesystem).manifest(place.tag)
        return manifest if manifest.metadata.get("file") == place.name else None
    return None


def _check_own_crcs(path: str) -> bool:
    """Compare every record of a torch file with the CRC beside it; False where there are none: torch's old format has
    none, and torch can be told to write none. Blocks. Raises CorruptCheckpointError: one differs, or it is no torch
    file."""
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
