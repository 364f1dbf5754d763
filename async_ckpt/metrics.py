"""What a save and a commit cost: plain data, filled in by the engine and handed to observers.

Times are seconds on ``time.perf_counter`` (durations) unless the name says ``unix``; sizes are bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on one thread, for timelines.

    ``kind`` is save (the stall of one call of `save`), copy or d2h (a chunk into staging), crc, open, write, share,
    truncate, fsync or close (of a file), publish (all that makes a checkpoint visible), and within that manifest, sync
    (of the directories), rename and sync root.
    """

    kind: str
    start_s: float
    end_s: float
    thread: str
    tag: str = ""
    path: str = ""
    offset: int = 0
    num_bytes: int = 0


OnStep = Callable[[str, float], None]
"""Called with (kind, start on ``time.perf_counter``) when a step of a commit has ended, on the thread that did it."""


@dataclass(slots=True)
class SaveMetrics:
    """One file of one checkpoint."""

    tag: str
    path: str
    size_bytes: int = 0
    written_bytes: int = 0
    """What of it was written; known once the file is synced."""
    shared_bytes: int = 0
    """What of it was not written, but shared with the file before (`reuse`)."""
    num_tensors: int = 0
    mode: str = "eager"
    """"eager", "lazy" or "streamed" (larger than the free staging memory)."""
    planner: str = ""
    """"fast", "torch" or "safetensors"; "torch" is the slower path that is right for every object."""
    plan_cached: bool = False
    direct: bool = False
    pinned: bool = False
    """Whether the staging chunks are page-locked: a device copies into them at its full rate."""
    stall_s: float = 0.0
    """Time the calling thread was blocked in `save`."""
    plan_s: float = 0.0
    backpressure_s: float = 0.0
    copy_s: float = 0.0
    crc_s: float = 0.0
    write_s: float = 0.0
    """Sum over chunks; may exceed wall time, because writes overlap."""
    sync_s: float = 0.0
    durable_s: float = 0.0
    """From the call of `save` until the file was synced."""


@dataclass(slots=True)
class CommitMetrics:
    """One checkpoint, from `create` to committed."""

    tag: str
    size_bytes: int = 0
    num_files: int = 0
    stall_s: float = 0.0
    """Time the training thread was blocked in create + save + commit, plus waits in the guard's step hook."""
    guard_wait_s: float = 0.0
    """The part of `stall_s` that was spent in the guard's step hook."""
    commit_s: float = 0.0
    """From the call of `commit` until committed."""
    total_s: float = 0.0
    """From the first `save` until committed: time until durable."""
    publish_s: float = 0.0
    max_queue_chunks: int = 0
    """The most chunks that waited for the disk at once, since the commit before this one ended."""
    num_undeleted: int = 0
    """Old checkpoints that the disk would not delete after this commit; they are tried again after the next."""
    num_failed_in_a_row: int = 0
    """Commits in a row that have failed, this one included, where `on_commit_failure` tolerates some."""
    saves: list[SaveMetrics] = field(default_factory=list)

    @property
    def written_bytes(self) -> int:
        """What of `size_bytes` was written."""
        return sum(save.written_bytes for save in self.saves)

    @property
    def shared_bytes(self) -> int:
        """What of `size_bytes` was not written, but shared with the checkpoint before (`reuse`)."""
        return sum(save.shared_bytes for save in self.saves)

    @property
    def backpressure_s(self) -> float:
        """The part of the stall that was spent waiting for free staging memory."""
        return sum(save.backpressure_s for save in self.saves)

    @property
    def copy_s(self) -> float:
        """Copying into staging memory, summed over files."""
        return sum(save.copy_s for save in self.saves)

    @property
    def crc_s(self) -> float:
        """Checksums, summed over chunks; may exceed wall time, as `write_s`."""
        return sum(save.crc_s for save in self.saves)

    @property
    def write_s(self) -> float:
        """Writing, summed over chunks."""
        return sum(save.write_s for save in self.saves)

    @property
    def sync_s(self) -> float:
        """Syncing the files, summed over files; `publish_s` holds the syncs of directories."""
        return sum(save.sync_s for save in self.saves)

    @property
    def direct(self) -> bool:
        """Whether every file was written past the page cache."""
        return bool(self.saves) and all(save.direct for save in self.saves)

    @property
    def bytes_per_s(self) -> float:
        """Durable throughput; 0.0 before the commit ended."""
        return self.size_bytes / self.total_s if self.total_s > 0 else 0.0


@dataclass(slots=True)
class MirrorMetrics:
    """One checkpoint on its way to one mirror, or (with an empty `url`) to all of them, summed."""

    tag: str
    url: str = ""
    size_bytes: int = 0
    num_objects: int = 0
    num_parts: int = 0
    sent_bytes: int = 0
    """Read and handed to the store; more than `size_bytes` where objects had to be sent again, less after a restart."""
    wait_s: float = 0.0
    """From the local commit until the upload began."""
    upload_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """Upload rate; 0.0 before the upload ended."""
        return self.sent_bytes / self.upload_s if self.upload_s > 0 else 0.0


class Observer(Protocol):
    """Told about every step, on the thread that did it; must return fast and must not raise.

    An exception in an observer never harms a checkpoint: it is reported once through
    ``warnings`` and that observer is then left out. A class that derives from this one needs to define only the
    methods it wants.
    """

    def on_span(self, span: Span) -> None:
        """A piece of work ended."""
        return None

    def on_save(self, metrics: SaveMetrics) -> None:
        """A file became durable."""
        return None

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
        """A commit ended; `error` is None on success."""
        return None

    def on_abort(self, metrics: CommitMetrics, error: BaseException) -> None:
        """A checkpoint was given up before its commit was called; `error` says why. No `on_commit` follows."""
        return None

    def on_mirror(self, metrics: MirrorMetrics, error: BaseException | None) -> None:
        """An upload to one mirror ended; `error` is None on success."""
        return None


ReadProgress = Callable[[str, int, int], None]
"""Called with (file, bytes just read, bytes of the file) on the thread that read them."""

_listeners: list[ReadProgress] = []


def read_listener() -> ReadProgress | None:
    """Who is told about the reads of a load that starts now."""
    return _listeners[-1] if _listeners else None


@contextlib.contextmanager
def listening_to_reads(on_read: ReadProgress) -> Iterator[None]:
    """Tell `on_read` about the reads of every `load` and `load_into` that starts within the block, in all threads of
    the process.
    """
    _listeners.append(on_read)
    try:
        yield
    finally:
        _listeners.remove(on_read)
