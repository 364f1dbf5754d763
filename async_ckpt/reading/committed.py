"""One committed checkpoint, held open: its manifest, its files, and whether they are exactly what was committed; and
which checkpoint a path lies in. No torch.

Guarantees:
- It is read through one directory descriptor; names are looked up in its manifest. Nothing else is opened, and below
  the checkpoint no link is followed.
- What a verification finds is collected, not raised: a report names every bad file and, where the container can still
  be read, the records in the damaged bytes. Files that somebody else put there are noted, and are no problem.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from ..errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CommitError,
    ConfigError,
    CorruptCheckpointError,
    escaped,
    some_of,
)
from ..format.manifest import FileEntry, Manifest
from ..format.names import MANIFEST_NAME, SINGLE_FILES_NAME, Root, StrPath, is_url
from ..storage.filesystem import DirHandle, FileSystem, ReadableFile, ReadSide
from ..threads.locks import Lock
from .errors import DAMAGE_ERRNOS, ExtentMismatch
from .records import damaged_records
from .verified_file import MemorySource, VerifiedFile, check_files

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


class CommittedCheckpoint:
    """One committed checkpoint, held open: its files stay the same ones while others replace or delete the tag."""

    def __init__(
        self, filesystem: ReadSide, root: Root, manifest: Manifest, directory: DirHandle, copied_from: str | None = None
    ) -> None:
        self.root = root.path
        self.copied_from = copied_from
        """The tag that it was committed under, where it is a copy, was renamed, or is reached through a link."""
        self._paths = root
        self.manifest = manifest
        self.directory = directory
        self._filesystem = filesystem

    def entry(self, path: StrPath) -> FileEntry:
        """The entry of a file, given relative to the tag or as `<root>/<tag>/...`. Raises UnsafePathError: malformed.
        CheckpointNotFoundError: not in this checkpoint."""
        _, inner = self._paths.split_committed(path, tag=self.manifest.tag)
        entry = self.manifest.file(inner)
        if entry is None:
            there = some_of([known.path for known in self.manifest.files], show=repr) or "no files"
            raise CheckpointNotFoundError(f"checkpoint {self.manifest.tag!r} has no file {inner!r}; it has {there}")
        return entry

    def open_file(
        self, entry: FileEntry, *, check: bool = True, num_threads: int | None = None, lend: MemorySource | None = None
    ) -> VerifiedFile:
        """`open_raw`, to be read with its checksums (`check`)."""
        return VerifiedFile(self.open_raw(entry), entry, check=check, num_threads=num_threads, lend=lend)

    def open_raw(self, entry: FileEntry) -> ReadableFile:
        """Open a file of exactly the committed size, around the page cache. Raises CorruptCheckpointError: missing, not
        a regular file, or another size. CheckpointNotFoundError: the checkpoint was deleted or replaced meanwhile."""
        try:
            return open_exact(self, entry, direct=True, who=f"{entry.path!r} in checkpoint {self.manifest.tag!r} ")
        except CorruptCheckpointError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not self.is_current():
                raise gone(self.manifest.tag) from error
            raise

    def open_read(self, parts: Sequence[str], *, direct: bool = False) -> ReadableFile:
        """As `DirHandle.open_read`; the file of a single-file checkpoint is looked for where its manifest says, too."""
        try:
            within = (self.manifest.attempt,) if self.manifest.attempt else ()
            return self.directory.open_read((*within, *parts), direct=direct)
        except FileNotFoundError:
            home, name = os.path.split(self.root)
            beside = self.manifest.metadata.get("file")
            if name != SINGLE_FILES_NAME or not isinstance(beside, str):
                raise
            with contextlib.closing(self._filesystem.open_dir(home)) as folder:
                return folder.open_read((beside,), direct=direct)

    def verify(self, level: Level, num_threads: int | None, progress: Progress | None) -> VerifyReport:
        """Compare all of it with its manifest. Raises as `verify_files`. CheckpointNotFoundError: it was deleted or
        replaced meanwhile."""
        tag, files = self.manifest.tag, self.manifest.files
        problems: list[Problem] = []
        extra: list[str] = []
        if level != "off":
            extra, problems = find_extra(self.directory, self.manifest)
            problems += verify_files(self, files, level=level, num_threads=num_threads, progress=progress)
        if problems and not self.is_current():
            raise gone(tag)
        return VerifyReport(tag, level, len(files), self.manifest.size_bytes, tuple(problems), tuple(extra))

    def is_current(self) -> bool:
        """Whether the tag still names this very directory."""
        return identity_of(self._filesystem, os.path.join(self.root, self.manifest.tag)) == self.directory.identity

    def close(self) -> None:
        """Close the directory; idempotent. Files opened from it stay open."""
        self.directory.close()

    def __enter__(self) -> CommittedCheckpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_exact(
    directory: DirHandle | CommittedCheckpoint, entry: FileEntry, *, direct: bool, who: str = ""
) -> ReadableFile:
    """Open a file that is as its manifest entry says, as far as its size tells. Raises CorruptCheckpointError: it is
    not, in words that follow `who`."""
    try:
        file = directory.open_read(entry.parts, direct=direct)
    except FileNotFoundError as error:
        raise CorruptCheckpointError(f"{who}is missing", path=entry.path) from error
    if file.size_bytes == entry.size_bytes:
        return file
    file.close()
    what = f"{who}has {file.size_bytes} bytes, {entry.size_bytes} were committed"
    raise CorruptCheckpointError(what, path=entry.path)


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
    problems: list[Problem] = []
    lock, done_bytes, total_bytes = Lock(), 0, sum(entry.size_bytes for entry in entries)

    def add(path: str, message: str, record: str | None = None, offset: int = 0) -> None:
        if len(problems) < _MAX_PROBLEMS:
            problems.append(Problem(path, escaped(message), None if record is None else escaped(record), offset))

    def on_damage(file: VerifiedFile, extent: int, error: CheckpointError) -> None:
        first, end = file.extent_range(extent)
        if len(problems) < _MAX_PROBLEMS:
            is_mismatch = isinstance(error, ExtentMismatch)
            message = f"bytes {first} to {end - 1} differ from what was committed" if is_mismatch else str(error)
            add(file.entry.path, message, damaged_records(file, extent) if is_mismatch else None, first)

    def on_read(name: str, num_bytes: int, file_bytes: int) -> None:
        nonlocal done_bytes
        with lock:
            done_bytes += num_bytes
            if progress is not None:
                progress(done_bytes, total_bytes)

    # Descriptors are bounded, however many files there are.
    for begin in range(0, len(entries), _MAX_OPEN_FILES):
        with contextlib.ExitStack() as opened:
            files = []
            for entry in entries[begin : begin + _MAX_OPEN_FILES]:
                try:
                    file = open_exact(directory, entry, direct=direct)
                except (CorruptCheckpointError, OSError) as error:
                    if isinstance(error, OSError) and error.errno not in DAMAGE_ERRNOS:
                        raise
                    add(entry.path, str(error))
                    continue
                checked = VerifiedFile(file, entry, check=True, on_read=on_read, on_damage=on_damage)
                files.append(opened.enter_context(checked))
            if level == "full":
                check_files(files, num_threads=num_threads)
    order = {entry.path: index for index, entry in enumerate(entries)}
    return sorted(problems, key=lambda problem: (order[problem.path], problem.offset))


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


def find_checkpoint(path: StrPath, filesystem: ReadSide) -> tuple[str, str, str] | None:
    """(root, tag, file) by the manifest nearest at or above `path`; the file is "" for a checkpoint itself. Blocks for
    lstat calls."""
    text = os.fspath(path)
    folder, name = text if is_url(text) else os.path.abspath(text), ""
    while True:
        above, tag = os.path.split(folder)
        if not tag or above.endswith(":"):
            return None
        # A link or FIFO in its place is damage, which whoever opens the checkpoint tells.
        if filesystem.stat(os.path.join(folder, MANIFEST_NAME)).kind != "missing":
            return above, tag, name
        folder, name = above, f"{tag}/{name}" if name else tag


def identity_of(filesystem: ReadSide, path: str) -> tuple[int, int]:
    """Device and inode of the directory that has this name, a link followed."""
    found = filesystem.stat(path)
    if found.kind != "other":
        return found.identity
    try:
        with contextlib.closing(filesystem.open_dir(path)) as directory:
            return directory.identity
    except OSError:
        # It leads nowhere (any more).
        return 0, 0


def gone(tag: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"checkpoint {tag!r} was deleted or replaced by another process while it was being read"
    )
