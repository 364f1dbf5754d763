"""What a new file takes over from the last committed one of its path, instead of writing it: ranges of blocks that both
share (reflinks), or, where the file system has none, the whole file by a second name (a hard link).

Guarantees: nothing is taken from a file that is not the very one that was committed, as it was then; and what cannot be
taken over is written. All calls block on the disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from ..errors import CheckpointError, CorruptCheckpointError
from ..format.checksum import crc32
from ..format.chunk import Chunk
from ..storage.filesystem import FileSystem
from ..storage.probe import CANNOT_CLONE
from ..storage.read_file import LocalReadableFile, Stamp
from ..storage.write_file import Ranges, WritableFile
from ..threads.locks import Lock
from .disk import PAGE_BYTES


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


def open_older(filesystem: FileSystem, older: OlderFile | None) -> Sharing | None:
    """The older file, open; None where it has vanished or changed, or nothing can be equal."""
    clones = filesystem.findings.clones
    if older is None or not (any if clones else all)(older.untouched):
        return None
    with contextlib.suppress(OSError, CheckpointError):
        source = filesystem.open_read(older.root, older.parts)
        if source.stamp == older.stamp:
            return Sharing(filesystem, older, source, by_link=not clones)
        source.close()
    return None


class Sharing:
    """An older file, open; `by_link`: it can be taken over as a whole only. Any thread; `close` when no other call
    runs."""

    def __init__(self, filesystem: FileSystem, older: OlderFile, source: LocalReadableFile, *, by_link: bool) -> None:
        self._filesystem = filesystem
        self._older = older
        self._source = source
        self.by_link = by_link
        self.stamp = source.stamp
        self._refuses = False
        self._cloned: set[int] = set()
        """Extents that the file shares already."""
        self._lock = Lock()
        self.shared_bytes = 0
        """What was taken over, and not written."""

    def close(self) -> None:
        """Close it; idempotent."""
        self._source.close()

    def read(self, chunk: Chunk, crc: int) -> None:
        """Fetch a chunk that is not here. Raises CorruptCheckpointError: it is damaged there."""
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
        return self._older.untouched[extent] and self._older.extent_crc32[extent] == crc

    def what_to_write(self) -> dict[str, Ranges]:
        """What is to be written in any case, for `FileSystem.open_write`."""
        older, step = self._older, self._older.extent_bytes
        if self.by_link or not older.is_counted:
            return {}
        starts = [k * step for k, untouched in enumerate(older.untouched) if not untouched]
        return {"written": [(start, min(step, older.size_bytes - start)) for start in starts]}

    @property
    def is_sure(self) -> bool:
        """Whether what is likely to be equal can be shared before its checksum is known."""
        return not self.by_link and self._older.is_counted and self._older.has_shared

    def clone_likely(self, file: WritableFile) -> None:
        """Let `file` share all that is likely to be equal before anything of it is written: a clone waits for the
        writes in flight. What is not equal all the same is written over it."""
        older, self._cloned = self._older, set()
        for is_likely, run in groupby(range(len(older.untouched)), key=older.untouched.__getitem__):
            extents = list(run)
            start, step = extents[0] * older.extent_bytes, len(extents) * older.extent_bytes
            if is_likely and self._clone(file, start, min(step, older.size_bytes - start)):
                self._cloned.update(extents)

    def share(self, file: WritableFile, offset: int, num_bytes: int) -> int:
        """Let `file` share the whole pages of an equal extent; returns how many bytes of it that were, 0 where it
        cannot."""
        is_cloned = offset // self._older.extent_bytes in self._cloned
        shared = num_bytes // PAGE_BYTES * PAGE_BYTES if is_cloned else self._clone(file, offset, num_bytes)
        with self._lock:
            self.shared_bytes += shared
        return shared

    def _clone(self, file: WritableFile, offset: int, num_bytes: int) -> int:
        whole = num_bytes // PAGE_BYTES * PAGE_BYTES
        if self.by_link or self._refuses or not whole:
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
