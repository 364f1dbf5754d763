"""What a new file takes over from the last committed one of its path, instead of writing it: ranges of blocks that both
share (reflinks), or, where the file system has none, the whole file by a second name (a hard link).

Guarantees: nothing is taken from a file that is not the very one that was committed, as it was then; and what cannot be
taken over is written. All calls block on the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..errors import CheckpointError, CorruptCheckpointError
from ..format.checksum import crc32
from ..format.chunk import Chunk
from ..format.shares import Share
from ..storage.filesystem import FileSystem
from ..storage.probe import CANNOT_CLONE
from ..storage.read_file import LocalReadableFile, Stamp
from ..storage.write_file import Ranges, WritableFile
from ..threads.locks import Lock
from .disk import PAGE_BYTES, bytes_to_write
from .jobs import Jobs


@dataclass(frozen=True)
class OlderFile:
    """A committed file, and what is known of it."""

    root: str
    parts: tuple[str, ...]
    """Where it is below `root`."""
    stamp: Stamp
    size_bytes: int
    extent_bytes: int
    extent_crc32: Sequence[int]
    untouched: list[bool]
    """By extent: whether the new file's content comes from the same memory, which nobody is known to have changed."""
    is_counted: bool = True
    """Whether that is likely to be so."""
    has_shared: bool = False
    """Whether it shares bytes with one before it: then what is likely to be equal is."""


FindOlder = Callable[[], OlderFile | None]


@dataclass(frozen=True)
class HowToWrite:
    """One file."""

    direct: bool
    """Past the page cache, where the file system allows it."""
    depth: int
    """So many chunks of it at most are sealed and written at once."""
    make_parents: bool
    tag: str
    older: FindOlder | None
    """Finds the committed file whose equal chunks are shared."""
    pass_over: Callable[[int, memoryview], int] | None = None
    """Called instead of `seal` for what is not here, but in that file."""
    share: Share | None = None
    """What of it is written here, where other processes write the rest. Whoever finishes it cuts it to its length: that
    waits for all writes."""

    async def open(
        self, filesystem: FileSystem, path: str, size_bytes: int, executor: Executor, sharing: Sharing | None
    ) -> WritableFile | UnwrittenFile:
        """Make the file, or open it where others may have made it. Raises as `FileSystem.open_write`."""
        more: Any = {} if sharing is None else sharing.what_to_write()
        if self.share is not None:
            if self.share.start == self.share.end:
                return UnwrittenFile()
            more = {"shared": True}
        file = await filesystem.open_write(path, size_bytes, direct=self.direct, executor=executor, **more)
        if sharing is not None and sharing.is_sure and self.share is None:
            try:
                await asyncio.wrap_future(executor.submit(sharing.clone_likely, file))
            except BaseException:
                await file.close()
                raise
        return file


class UnwrittenFile:
    """In the place of a file of which nothing is written here."""

    direct, stamp = False, None

    async def truncate(self, size_bytes: int) -> None:
        """Nothing to do."""

    async def fsync(self) -> None:
        """Nothing to do."""

    async def close(self) -> None:
        """Nothing to do."""


class Sharing:
    """The older file that `find` gives, if it does. Any thread; `close` when no other call runs."""

    def __init__(self, filesystem: FileSystem, find: FindOlder | None) -> None:
        self._filesystem = filesystem
        self._find = find
        self._was_opened = False
        self._older: OlderFile | None = None
        self._source: LocalReadableFile | None = None
        self._refuses = False
        self._cloned: set[int] = set()
        """Extents that the file shares already."""
        self._lock = Lock()
        self.shared_bytes = 0
        """What was taken over, and not written."""
        self.by_link = False
        """Whether the whole file can be taken over, and no part of it."""

    def open(self) -> None:
        """Open it, unless it has vanished or changed, or nothing can be equal; idempotent."""
        if self._was_opened:
            return
        self._was_opened = True
        older, clones = self._find and self._find(), self._filesystem.findings.clones
        if older is None or not (any if clones else all)(older.untouched):
            return
        with contextlib.suppress(OSError, CheckpointError):
            self._source = self._filesystem.open_read(older.root, older.parts)
        if self._source is not None and self._source.stamp == older.stamp:
            self._older, self.by_link = older, not clones

    @property
    def stamp(self) -> Stamp | None:
        """The older file's."""
        return None if self._older is None else self._older.stamp

    @property
    def is_open(self) -> bool:
        """Whether there is anything to share."""
        return self._older is not None

    def read(self, chunk: Chunk, crc: int) -> None:
        """Fetch a chunk that is not here. Raises CorruptCheckpointError: it is damaged there."""
        assert self._source is not None
        view = chunk.buffer[: chunk.nbytes]
        self._source.pread_into(view, chunk.offset)
        if crc32(view) != crc:
            path = self._source.path
            raise CorruptCheckpointError(
                f"{path} is damaged: its bytes from offset {chunk.offset} on were to be taken over for frozen tensors "
                "(reuse_frozen), and are not what was committed; this file is not committed",
                path=path,
            )

    def is_equal(self, extent: int, crc: int) -> bool:
        """Whether an extent, with this checksum, is the older file's."""
        older = self._older
        return older is not None and older.untouched[extent] and older.extent_crc32[extent] == crc

    def what_to_write(self) -> dict[str, Ranges]:
        """What is to be written in any case, for `FileSystem.open_write`."""
        older = self._older
        if older is None or self.by_link or not older.is_counted:
            return {}
        step = older.extent_bytes
        starts = [k * step for k, untouched in enumerate(older.untouched) if not untouched]
        return {"written": [(start, min(step, older.size_bytes - start)) for start in starts]}

    @property
    def is_sure(self) -> bool:
        """Whether what is likely to be equal can be shared before its checksum is known."""
        return self._older is not None and not self.by_link and self._older.is_counted and self._older.has_shared

    def clone_likely(self, file: WritableFile) -> None:
        """Let `file` share all that is likely to be equal before anything of it is written: a clone waits for the
        writes in flight. What is not equal all the same is written over it."""
        older, self._cloned = self._older, set()
        assert older is not None
        for is_likely, run in groupby(range(len(older.untouched)), key=older.untouched.__getitem__):
            extents = list(run)
            start, step = extents[0] * older.extent_bytes, len(extents) * older.extent_bytes
            if is_likely and self._clone(file, start, min(step, older.size_bytes - start)):
                self._cloned.update(extents)

    def share(self, file: WritableFile, offset: int, num_bytes: int) -> int:
        """Let `file` share the whole pages of an equal extent; returns how many bytes of it that were, 0 where it
        cannot."""
        assert self._older is not None
        is_cloned = offset // self._older.extent_bytes in self._cloned
        shared = num_bytes // PAGE_BYTES * PAGE_BYTES if is_cloned else self._clone(file, offset, num_bytes)
        with self._lock:
            self.shared_bytes += shared
        return shared

    def _clone(self, file: WritableFile, offset: int, num_bytes: int) -> int:
        whole = num_bytes // PAGE_BYTES * PAGE_BYTES
        if self.by_link or self._refuses or not whole or self._source is None:
            return 0
        error = file.clone(self._source, offset, whole)
        if error is None:
            return whole
        # The next file may try again, unless it never works here.
        self._refuses = True
        if error.errno in CANNOT_CLONE:
            self._filesystem.cannot_clone()
        return 0

    def link(self, path: str) -> bool:
        """Make `path` another name of the older file; False, and nothing is there, where that cannot be."""
        assert self._source is not None
        try:
            self._filesystem.link(self._source.path, path)
        except OSError:
            return False
        if self._filesystem.stat(path).identity == self._source.stamp[:2]:
            self.shared_bytes = self._source.size_bytes
            return True
        # Somebody has put another file in its place.
        self._filesystem.unlink(path)
        return False

    def close(self) -> None:
        """Close the older file; idempotent."""
        if self._source is not None:
            self._source.close()


def share_or_write(chunk: Chunk, file: WritableFile, jobs: Jobs, sharing: Sharing | None, crc: int) -> None:
    """Put a sealed chunk into its place in `file`. `sharing`: where it is equal to the older file's."""
    at, nbytes, shared = chunk.offset, chunk.nbytes, 0
    if sharing is not None:
        shared = jobs.timed("share", at, nbytes, lambda: sharing.share(file, at, nbytes))
    if shared < nbytes or not nbytes:
        if chunk.is_elsewhere and sharing is not None:
            sharing.read(chunk, crc)
        rest = bytes_to_write(chunk, file)[shared:]
        jobs.timed("write", at + shared, nbytes - shared, lambda: file.pwrite(rest, at + shared))
