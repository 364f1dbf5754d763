"""What an engine tells the world about itself, for `async-ckpt watch`: looked up by a thread of its own, not reported by others.

Guarantees:
- Training and writing pay one call per checkpoint, nothing per file or chunk; everything else is read from outside.
- Nothing that goes wrong in here reaches a checkpoint (see `observers.status_writer`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..host.process import Owner, current_owner
from ..observers import status_writer
from ..observers.published import remove_stale_runtime
from ..observers.status import StatusObserver
from ..observers.status_document import RATE_WINDOW_S, encode
from ..observers.status_places import RuntimePlace, SharedPlace, StatusPlace
from ..observers.status_writer import StatusWriter
from ..threads.locks import Lock
from ..transaction import State

if TYPE_CHECKING:
    from ..config import EngineConfig
    from ..coordination import Coordinator
    from ..writer import WriterPool
    from .checkpoint import OpenCheckpoint


_ENDED = (State.COMMITTED, State.ABORTED)


def start(config: EngineConfig, root: str, pool: WriterPool, coordinator: Coordinator) -> StatusPublisher | None:
    """Publish where the configuration says; None where it says nowhere."""
    # This very process, whatever the seam to the disk pretends.
    owner, number = current_owner(), next(status_writer.numbers)
    places: list[StatusPlace] = [RuntimePlace(root, owner, number)] if config.publish_status else []
    places += [SharedPlace(o.directory, owner, number) for o in config.observers if isinstance(o, StatusObserver)]
    if not places:
        return None
    return StatusPublisher(root, owner, places, pool, rank=coordinator.rank, world_size=coordinator.world_size)


def opened(publisher: StatusPublisher | None, checkpoint: OpenCheckpoint) -> None:
    """A checkpoint was created; somebody may publish it."""
    if publisher is not None:
        publisher.opened(checkpoint)


def aborted(publisher: StatusPublisher | None, checkpoint: OpenCheckpoint) -> None:
    """A checkpoint was given up before its commit; somebody may publish that."""
    if publisher is not None:
        publisher.aborted(checkpoint)


class StatusPublisher:
    """Publishes to `places` until `close`. `opened` and `ended`: any thread, never block, never raise."""

    def __init__(self, root: str, owner: Owner, places: Sequence[StatusPlace], pool: WriterPool, *, rank: int, world_size: int) -> None:
        self._owner = owner
        self._pool = pool
        self._about = {"root": root, "rank": rank, "world_size": world_size}
        self._lock = Lock()
        self._flying: dict[int, OpenCheckpoint] = {}
        self._ended_bytes = 0
        self._num_committed = self._num_failed = self._num_aborted = 0
        self._last: dict[str, Any] | None = None
        self._samples: deque[tuple[float, int]] = deque()
        self._writer = StatusWriter(self._document, places, at_first=remove_stale_runtime)

    def opened(self, checkpoint: OpenCheckpoint) -> None:
        """A checkpoint was created."""
        with self._lock:
            self._flying[id(checkpoint)] = checkpoint
        self._writer.changed()

    def aborted(self, checkpoint: OpenCheckpoint) -> None:
        """A checkpoint was given up before its commit."""
        with self._lock:
            self._forget(checkpoint)
            self._num_aborted += 1
        self._writer.changed()

    def ended(self, checkpoint: OpenCheckpoint, error: BaseException | None) -> None:
        """A commit ended."""
        metrics = checkpoint.metrics
        with self._lock:
            self._forget(checkpoint)
            self._num_committed += error is None
            self._num_failed += error is not None
            self._last = {
                "tag": metrics.tag,
                "error": None if error is None else str(error)[:500],
                "ended_unix_s": time.time(),
                "size_bytes": metrics.size_bytes,
                "stall_s": metrics.stall_s,
                "total_s": metrics.total_s,
                "bytes_per_s": metrics.bytes_per_s,
                "backpressure_s": metrics.backpressure_s,
            }
        self._writer.changed()

    def flush(self) -> bool:
        """Block until all that was so is published; for tests and orderly hand-overs."""
        return self._writer.flush()

    def close(self) -> None:
        """Remove what was published; idempotent."""
        self._writer.close()

    def _forget(self, checkpoint: OpenCheckpoint) -> None:
        if self._flying.pop(id(checkpoint), None) is not None:
            self._ended_bytes += _written_bytes(checkpoint)

    def _document(self) -> tuple[bytes, bool]:
        with self._lock:
            # One that ended without a word (an interrupt in between) must not be shown for ever.
            for checkpoint in [c for c in self._flying.values() if c.state in _ENDED]:
                self._forget(checkpoint)
            flying = list(self._flying.values())
            written_bytes = self._ended_bytes + sum(map(_written_bytes, flying))
            fields = {
                **self._about,
                "in_flight": [_describe(checkpoint) for checkpoint in flying],
                "queue_bytes": sum(file.write.submitted_bytes for c in flying for file in tuple(c.files.values()))
                - sum(map(_written_bytes, flying)),
                "queue_chunks": self._pool.num_queued,
                "written_bytes": written_bytes,
                "bytes_per_s": self._rate(written_bytes),
                "num_committed": self._num_committed,
                "num_failed": self._num_failed,
                "num_aborted": self._num_aborted,
                "last": self._last,
            }
        return encode(self._owner, fields), bool(flying)

    def _rate(self, written_bytes: int) -> float:
        now_s = time.monotonic()
        self._samples.append((now_s, written_bytes))
        # The sample before the window stays: it says what had been written when the window began.
        while len(self._samples) > 2 and self._samples[1][0] < now_s - RATE_WINDOW_S:
            self._samples.popleft()
        first_s, first_bytes = self._samples[0]
        return (written_bytes - first_bytes) / max(now_s - first_s, RATE_WINDOW_S if first_s == now_s else 1e-3)


def _describe(checkpoint: OpenCheckpoint) -> dict[str, Any]:
    files = tuple(checkpoint.files.values())
    return {
        "tag": checkpoint.tag,
        "state": "open" if checkpoint.commit_s == 0.0 else "committing",
        "since_unix_s": checkpoint.opened_unix_s,
        "size_bytes": sum(file.write.size_bytes for file in files),
        "copied_bytes": sum(file.write.submitted_bytes for file in files),
        "written_bytes": sum(file.write.written_bytes for file in files),
        "num_files": len(files),
        "stall_s": checkpoint.metrics.stall_s,
    }


def _written_bytes(checkpoint: OpenCheckpoint) -> int:
    return sum(file.write.written_bytes for file in tuple(checkpoint.files.values()))
