"""Does a checkpoint hold exactly the bytes that were committed? Presence, sizes and the CRC of every extent.

Problems are collected, not raised: a report names every bad file and, where the container can still be read, the
records in the damaged bytes. Files that somebody else put there are noted, and are no problem.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from ..errors import CheckpointError, CommitError, ConfigError, CorruptCheckpointError, escaped
from ..format.manifest import FileEntry, Manifest
from ..format.names import MANIFEST_NAME
from ..storage.filesystem import DirHandle, FileSystem
from ..threads.locks import Lock
from .committed import CommittedCheckpoint, gone, open_exact
from .errors import DAMAGE_ERRNOS, ExtentMismatch
from .records import damaged_records
from .verified_file import VerifiedFile, check_files

Level = Literal["full", "size", "off"]
Progress = Callable[[int, int], None]
"""Called with (bytes checked, bytes in all) on the threads that read, one at a time."""

_MAX_PROBLEMS = 1000
_MAX_OPEN_FILES = 128


@dataclass(frozen=True)
class Problem:
    """One thing that is not as committed; `record` names what lies in the damaged bytes, where that is known."""

    path: str
    message: str
    record: str | None = None
    offset: int = 0

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" + (f" (record {self.record})" if self.record else "")


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found; `ok` when all that was committed is there as it was."""

    tag: str
    level: Level
    num_files: int
    size_bytes: int
    problems: tuple[Problem, ...]
    extra: tuple[str, ...] = ()
    """Files in the directory that are no part of the checkpoint (an evaluation's results, a file manager's): no
    problem."""

    @property
    def ok(self) -> bool:
        """Nothing is wrong."""
        return not self.problems

    def raise_if_bad(self) -> None:
        """Raises CorruptCheckpointError with the first problem, and the number of others."""
        if self.problems:
            first, more = self.problems[0], len(self.problems) - 1
            text = f"checkpoint {self.tag!r}: {first}" + (f"; and {more} more problems" if more else "")
            raise CorruptCheckpointError(text, path=first.path, record=first.record)


def check_level(level: str) -> Level:
    if level not in ("full", "size", "off"):
        raise ConfigError(f"verify must be 'full', 'size' or 'off', not {level!r}")
    return cast(Level, level)


def verify_checkpoint(
    checkpoint: CommittedCheckpoint, level: Level, num_threads: int | None, progress: Progress | None
) -> VerifyReport:
    """Compare everything in an open checkpoint with its manifest. Raises as `verify_files`. CheckpointNotFoundError: it
    was deleted or replaced meanwhile."""
    manifest = checkpoint.manifest
    problems: list[Problem] = []
    extra: list[str] = []
    if level != "off":
        extra, problems = find_extra(checkpoint.directory, manifest)
        problems += verify_files(checkpoint, manifest.files, level=level, num_threads=num_threads, progress=progress)
    if problems and not checkpoint.is_current():
        raise gone(manifest.tag)
    return VerifyReport(manifest.tag, level, len(manifest.files), manifest.size_bytes, tuple(problems), tuple(extra))


def verify_files(
    directory: DirHandle | CommittedCheckpoint,
    entries: Sequence[FileEntry],
    *,
    level: Level = "full",
    num_threads: int | None = None,
    direct: bool = False,
    progress: Progress | None = None,
) -> list[Problem]:
    """Compare files below `directory` with their manifest entries; blocks until all are read. With `direct`, around the
    page cache: what the disk holds, rather than what was written. Raises OSError: a shortage of this process or machine
    (descriptors, memory, permissions) kept a file from being read."""
    found = _Problems(sum(entry.size_bytes for entry in entries), progress)
    # Descriptors are bounded, however many files there are.
    for first in range(0, len(entries) if level != "off" else 0, _MAX_OPEN_FILES):
        with contextlib.ExitStack() as opened:
            files = []
            for entry in entries[first : first + _MAX_OPEN_FILES]:
                file = found.open(directory, entry, direct)
                if file is not None:
                    opened.enter_context(file)
                    files.append(file)
            if level == "full":
                check_files(files, num_threads=num_threads)
    order = {entry.path: index for index, entry in enumerate(entries)}
    return sorted(found.problems, key=lambda problem: (order[problem.path], problem.offset))


class _Problems:
    """Collects what is wrong, and counts what was read. Any thread."""

    def __init__(self, total_bytes: int, progress: Progress | None) -> None:
        self.problems: list[Problem] = []
        self._lock = Lock()
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._progress = progress

    def open(self, directory: DirHandle | CommittedCheckpoint, entry: FileEntry, direct: bool) -> VerifiedFile | None:
        """The file, or None where it is no file of the right size."""
        try:
            file = open_exact(directory, entry, direct=direct)
        except (CorruptCheckpointError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in DAMAGE_ERRNOS:
                raise
            self._add(entry.path, str(error))
            return None
        return VerifiedFile(file, entry, check=True, on_read=self._on_read, on_damage=self._on_damage)

    def _on_damage(self, file: VerifiedFile, extent: int, error: CheckpointError) -> None:
        first, end = file.extent_range(extent)
        if len(self.problems) < _MAX_PROBLEMS:
            is_mismatch = isinstance(error, ExtentMismatch)
            message = f"bytes {first} to {end - 1} differ from what was committed" if is_mismatch else str(error)
            self._add(file.entry.path, message, damaged_records(file, extent) if is_mismatch else None, first)

    def _add(self, path: str, message: str, record: str | None = None, offset: int = 0) -> None:
        problem = Problem(path, escaped(message), None if record is None else escaped(record), offset)
        with self._lock:
            if len(self.problems) < _MAX_PROBLEMS:
                self.problems.append(problem)

    def _on_read(self, name: str, num_bytes: int, file_bytes: int) -> None:
        with self._lock:
            self._done_bytes += num_bytes
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)


def read_back(fs: FileSystem, location: str, entries: Sequence[FileEntry]) -> None:
    """Read staged files from the disk, around the page cache where it lets, and compare them with their entries. Raises
    CommitError: they differ, or cannot be read; nothing was committed."""
    try:
        with contextlib.closing(fs.open_dir(location)) as directory:
            problems = verify_files(directory, entries, direct=True)
    except OSError as error:
        raise CommitError(
            f"the staged files cannot be read ({error}); nothing was committed",
            step="read back",
            errno=error.errno,
            path=location,
        ) from error
    if problems:
        raise CommitError(
            f"{problems[0]}; nothing was committed", step="read back", path=os.path.join(location, problems[0].path)
        )


def find_extra(directory: DirHandle, manifest: Manifest) -> tuple[list[str], list[Problem]]:
    """Files in the checkpoint that the manifest does not name, and folders that cannot be read; empty directories are
    fine, and so are other attempts of a mirror."""
    within = f"{manifest.attempt}/" if manifest.attempt else ""
    expected = {within + entry.path for entry in manifest.files} | {MANIFEST_NAME}
    extra: list[str] = []
    problems: list[Problem] = []
    todo = [manifest.attempt]
    while todo and len(extra) < _MAX_PROBLEMS:
        folder = todo.pop()
        parts = tuple(folder.split("/")) if folder else ()
        try:
            for name, kind in directory.entries(parts):
                path = "/".join((*parts, name))
                if kind == "dir":
                    todo.append(path)
                elif path not in expected:
                    extra.append(ascii(path)[1:-1])
        except (FileNotFoundError, CorruptCheckpointError):
            # Whatever should be in there is reported as missing already.
            continue
        except OSError as error:
            if error.errno not in DAMAGE_ERRNOS:
                raise
            problems.append(Problem(folder or ".", str(error)))
    return sorted(extra)[:_MAX_PROBLEMS], problems
