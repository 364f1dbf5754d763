"""What a save and a commit cost: plain data, filled in by the engine and handed to observers.

Times are seconds on ``time.perf_counter`` (durations) unless the name says ``unix``; sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Span:
    """One piece of work on one thread, for timelines.

    ``kind`` is save (the stall of one call of `save`), copy or d2h (a chunk into staging), crc, write, fsync,
    manifest or rename.
    """

    kind: str
    start_s: float
    end_s: float
    thread: str
    tag: str = ""
    path: str = ""
    offset: int = 0
    num_bytes: int = 0


@dataclass(slots=True)
class SaveMetrics:
    """One file of one checkpoint."""

    tag: str
    path: str
    size_bytes: int = 0
    num_tensors: int = 0
    mode: str = "eager"
    """"eager", "lazy" or "streamed" (larger than the free staging memory)."""
    planner: str = ""
    """"fast", "torch" or "safetensors"; "torch" is the slower path that is right for every object."""
    plan_cached: bool = False
    direct: bool = False
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
    saves: list[SaveMetrics] = field(default_factory=list)

    @property
    def bytes_per_s(self) -> float:
        """Durable throughput; 0.0 before the commit ended."""
        return self.size_bytes / self.total_s if self.total_s > 0 else 0.0


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
