"""Does a checkpoint hold exactly the bytes that were committed? Presence, sizes and the CRC of every extent.

Extents are read and summed by a few threads that end with the call; each holds one buffer of bounded size, whatever
the manifest says. Problems are collected, not raised: a report names every bad file and, where the container can
still be read, the records in the damaged bytes.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Literal

from .checksum import crc32
from .errors import CommitError, CorruptCheckpointError
from .filesystem import DirHandle, FileSystem, ReadableFile
from .host.memory import region
from .manifest import MANIFEST_NAME, FileEntry

Level = Literal["full", "size", "off"]
Progress = Callable[[int, int], None]
"""Called with (bytes checked, bytes in all) on the thread that asked for the verification."""

# The disk or the kernel says that the data is bad or gone: damage, not a passing shortage (EMFILE, ENOMEM).
DAMAGE_ERRNOS = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ESTALE, errno.ENODATA, errno.EREMOTEIO})

_WINDOW_BYTES = 4 << 20
_MAX_PROBLEMS = 1000
_MAX_THREADS = 8
_MAX_OPEN_FILES = 128
_MAX_SUMMED_RECORDS = 64
_MAX_SUMMED_BYTES = 64 << 20


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
    """What a verification found; `ok` when nothing is wrong."""

    tag: str
    level: Level
    num_files: int
    size_bytes: int
    problems: tuple[Problem, ...]

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


def verify_files(
    directory: DirHandle,
    entries: Sequence[FileEntry],
    *,
    level: Level = "full",
    num_threads: int | None = None,
    direct: bool = False,
    progress: Progress | None = None,
) -> list[Problem]:
    """Compare files below `directory` with their manifest entries; blocks until all are read.

    `direct` reads around the page cache, so that what the disk holds is checked rather than what was written.

    Raises:
        OSError: a shortage of this process or machine (descriptors, memory, permissions) kept a file from being read.
    """
    if level == "off":
        return []
    problems: list[Problem] = []
    total_bytes = sum(entry.size_bytes for entry in entries)
    done_bytes = 0
    # Descriptors are bounded, however many files there are.
    for first in range(0, len(entries), _MAX_OPEN_FILES):
        with contextlib.ExitStack() as opened:
            work: list[tuple[FileEntry, ReadableFile]] = []
            for entry in entries[first : first + _MAX_OPEN_FILES]:
                file = _open_checked(directory, entry, direct, problems)
                if file is not None:
                    opened.callback(file.close)
                    work.append((entry, file))
            if level == "full":
                # Closed before the files are, whatever `progress` raises: its threads read from them.
                with contextlib.closing(_check_extents(work, num_threads)) as results:
                    for num_bytes, bad in results:
                        problems += bad[: max(0, _MAX_PROBLEMS - len(problems))]
                        done_bytes += num_bytes
                        if progress is not None:
                            progress(done_bytes, total_bytes)
    order = {entry.path: index for index, entry in enumerate(entries)}
    return sorted(problems, key=lambda problem: (order[problem.path], problem.offset))


def read_back(fs: FileSystem, location: str, entries: Sequence[FileEntry]) -> None:
    """Read staged files from the disk, around the page cache where it lets, and compare them with their entries.

    Raises:
        CommitError: they differ, or cannot be read; nothing was committed.
    """
    try:
        with contextlib.closing(fs.open_dir(location)) as directory:
            problems = verify_files(directory, entries, direct=True)
    except OSError as error:
        raise CommitError(
            f"the staged files cannot be read ({error}); nothing was committed", step="read back", errno=error.errno, path=location
        ) from error
    if problems:
        raise CommitError(f"{problems[0]}; nothing was committed", step="read back", path=os.path.join(location, problems[0].path))


def find_extra(directory: DirHandle, entries: Sequence[FileEntry]) -> list[Problem]:
    """Files in the checkpoint that the manifest does not name; empty directories are fine."""
    expected = {entry.path for entry in entries} | {MANIFEST_NAME}
    folders = {tuple(path.split("/")[:depth]) for path in expected for depth in range(path.count("/") + 1)}
    problems: list[Problem] = []
    for folder in sorted(folders):
        try:
            found = directory.entries(folder)
        except (FileNotFoundError, CorruptCheckpointError):
            # Whatever should be in there is reported as missing already.
            continue
        except OSError as error:
            if error.errno not in DAMAGE_ERRNOS:
                raise
            problems.append(Problem("/".join(folder) or ".", str(error)))
            continue
        for name, kind in found:
            path = "/".join((*folder, name))
            if len(problems) >= _MAX_PROBLEMS:
                return problems
            if kind == "dir" and (*folder, name) not in folders and _is_empty(directory, (*folder, name)):
                continue
            if (kind == "dir" and (*folder, name) in folders) or path in expected:
                continue
            problems.append(Problem(ascii(path)[1:-1], "is not in the manifest"))
    return problems


def _is_empty(directory: DirHandle, parts: Sequence[str]) -> bool:
    try:
        return all(kind == "dir" and _is_empty(directory, (*parts, name)) for name, kind in directory.entries(parts))
    except (FileNotFoundError, CorruptCheckpointError, RecursionError):
        return False


def _open_checked(directory: DirHandle, entry: FileEntry, direct: bool, problems: list[Problem]) -> ReadableFile | None:
    try:
        file = directory.open_read(entry.parts, direct=direct)
    except FileNotFoundError:
        problems.append(Problem(entry.path, "is missing"))
    except CorruptCheckpointError as error:
        problems.append(Problem(entry.path, str(error)))
    except OSError as error:
        if error.errno not in DAMAGE_ERRNOS:
            raise
        problems.append(Problem(entry.path, str(error)))
    else:
        if file.size_bytes == entry.size_bytes:
            return file
        problems.append(Problem(entry.path, f"has {file.size_bytes} bytes, {entry.size_bytes} were committed"))
        file.close()
    return None


def _check_extents(
    work: Sequence[tuple[FileEntry, ReadableFile]], num_threads: int | None
) -> Generator[tuple[int, list[Problem]], None, None]:
    """Read everything, a few windows at a time, in no order; gives (bytes read, problems) for each."""
    limit = num_threads or min(_MAX_THREADS, os.cpu_count() or 1)
    buffers = threading.local()
    windows = _windows(work)
    # Here, because it brings asyncio with it: a command line that only lists must not wait for that.
    from .threads.executor import DaemonExecutor

    pool = DaemonExecutor("async-ckpt-verify", limit)
    running: set[Future[tuple[int, list[Problem]]]] = set()
    try:
        while True:
            for window in itertools.islice(windows, 2 * limit - len(running)):
                running.add(pool.submit(_check_window, buffers, *window))
            if not running:
                return
            finished, running = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _windows(work: Sequence[tuple[FileEntry, ReadableFile]]) -> Iterator[tuple[FileEntry, ReadableFile, int, int]]:
    """Runs of whole extents, [first, last) in each file, of about one window's bytes."""
    for entry, file in work:
        step = max(1, _WINDOW_BYTES // max(1, entry.extent_bytes))
        for first in range(0, len(entry.extent_crc32), step):
            yield entry, file, first, min(first + step, len(entry.extent_crc32))


def _check_window(buffers: threading.local, entry: FileEntry, file: ReadableFile, first: int, last: int) -> tuple[int, list[Problem]]:
    if not hasattr(buffers, "memory"):
        buffers.memory = region(_WINDOW_BYTES)
    memory: memoryview = buffers.memory
    start = first * entry.extent_bytes
    end = min(last * entry.extent_bytes, entry.size_bytes)
    bad: list[Problem] = []
    try:
        if end - start <= _WINDOW_BYTES:
            file.pread_into(memory[: end - start], start)
            actual = [
                crc32(memory[offset : min(offset + entry.extent_bytes, end - start)])
                for offset in range(0, end - start, entry.extent_bytes)
            ]
        else:
            actual = [_crc_of_long_extent(memory, file, start, end)]
    except (CorruptCheckpointError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in DAMAGE_ERRNOS:
            raise
        return end - start, [Problem(entry.path, str(error), offset=start)]
    for number, value in enumerate(actual, first):
        if value != entry.extent_crc32[number]:
            offset = number * entry.extent_bytes
            stop = min(offset + entry.extent_bytes, entry.size_bytes)
            record = name_records(file, entry, offset, stop)
            bad.append(Problem(entry.path, f"bytes {offset} to {stop - 1} differ from what was committed", record, offset))
            if len(bad) >= _MAX_PROBLEMS:
                break
    return end - start, bad


def _crc_of_long_extent(memory: memoryview, file: ReadableFile, start: int, end: int) -> int:
    value = 0
    for offset in range(start, end, _WINDOW_BYTES):
        part = memory[: min(_WINDOW_BYTES, end - offset)]
        file.pread_into(part, offset)
        value = crc32(part, value)
    return value


def name_records(file: ReadableFile, entry: FileEntry, start: int, stop: int) -> str | None:
    """The container's records that touch bytes [start, stop), narrowed to those whose own CRC fails; None if unknown."""
    if entry.format != "torch":
        return None
    from .format.zip_directory import read_directory

    def pread(offset: int, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        file.pread_into(memoryview(data), offset)
        return bytes(data)

    try:
        touching = [
            record for record in read_directory(pread, file.size_bytes) if record.offset < stop and record.offset + record.nbytes > start
        ]
        broken = [
            record
            for record in touching[:_MAX_SUMMED_RECORDS]
            if record.nbytes <= _MAX_SUMMED_BYTES and _record_crc(file, record.offset, record.nbytes) != record.crc32
        ]
    except (CorruptCheckpointError, OSError):
        # The damage is in the container itself: there are no names to give.
        return None
    names = [record.name for record in broken or touching]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else None


def _record_crc(file: ReadableFile, offset: int, num_bytes: int) -> int:
    memory = memoryview(bytearray(min(num_bytes, 1 << 20)))
    value = 0
    for done in range(0, num_bytes, 1 << 20):
        part = memory[: min(1 << 20, num_bytes - done)]
        file.pread_into(part, offset + done)
        value = crc32(part, value)
    return value
