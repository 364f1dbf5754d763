"""What a running training's engine is doing, published as a small file in the root, and read back by `async-ckpt watch`.

The file is `.status.<owner>.json`, one per process, replaced atomically at most a few times per second. It is a courtesy,
not a record: it is never synced, readers treat it as untrusted, and it goes away with its process.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from ..errors import CheckpointError
from ..filesystem import FileSystem, LocalFileSystem
from ..filesystem.owner import Owner, OwnerState
from ..metrics import CommitMetrics, Observer, Span
from ..names import parse_status_name, status_name

logger = logging.getLogger("async_ckpt")

MAX_STATUS_BYTES = 1 << 20
_VERSION = 1
_MIN_INTERVAL_S = 0.25
_RATE_WINDOW_S = 5.0
_GONE = (OwnerState.DEAD, OwnerState.REBOOTED)


class StatusObserver(Observer):
    """Publishes the engine's state into `root` for `async-ckpt watch`. Any thread; a write takes some 50 us.

    A disk that refuses the file is reported once, and tried again later; it never harms a checkpoint.

    Args:
        root: the engine's root. The first status is published with the first save.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(os.fspath(root))
        self._filesystem = LocalFileSystem()
        self._lock = threading.Lock()
        self._started_unix_s = time.time()
        self._published_s = float("-inf")
        self._in_flight: dict[str, dict[str, Any]] = {}
        self._last: dict[str, Any] | None = None
        self._num_committed = self._num_failed = 0
        self._written_bytes = 0
        self._recent: deque[tuple[float, int]] = deque()
        self._is_reported = False
        self._pid = os.getpid()
        owner = self._filesystem.owner()
        self._path = os.path.join(self._root, status_name(owner))
        self._owner = str(owner)
        self._finalizer = weakref.finalize(self, _remove_own, self._path, self._pid)

    def on_span(self, span: Span) -> None:
        now_s = time.perf_counter()
        with self._lock:
            if span.tag and span.kind in ("save", "copy", "d2h", "write"):
                flying = self._in_flight.setdefault(span.tag, _new_flying(span.tag))
                if span.kind == "save":
                    flying["stall_s"] += span.end_s - span.start_s
                elif span.kind == "write":
                    flying["written_bytes"] += span.num_bytes
                    self._written_bytes += span.num_bytes
                    self._recent.append((now_s, span.num_bytes))
                else:
                    flying["copied_bytes"] += span.num_bytes
            if now_s - self._published_s >= _MIN_INTERVAL_S:
                self._publish(now_s)

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
        with self._lock:
            self._in_flight.pop(metrics.tag, None)
            self._num_failed += error is not None
            self._num_committed += error is None
            self._last = {
                "tag": metrics.tag,
                "error": None if error is None else str(error)[:500],
                "ended_unix_s": time.time(),
                "size_bytes": metrics.size_bytes,
                "stall_s": metrics.stall_s,
                "total_s": metrics.total_s,
                "bytes_per_s": metrics.bytes_per_s,
                "backpressure_s": sum(save.backpressure_s for save in metrics.saves),
            }
            self._publish(time.perf_counter())

    def close(self) -> None:
        """Remove the file; idempotent."""
        self._finalizer()

    def _publish(self, now_s: float) -> None:
        if os.getpid() != self._pid or not self._finalizer.alive:
            return
        is_first = self._published_s == float("-inf")
        self._published_s = now_s
        while self._recent and self._recent[0][0] < now_s - _RATE_WINDOW_S:
            self._recent.popleft()
        document = {
            "format": "async-ckpt-status",
            "format_version": _VERSION,
            "owner": self._owner,
            "pid": self._pid,
            "started_unix_s": self._started_unix_s,
            "updated_unix_s": time.time(),
            "in_flight": list(self._in_flight.values())[-64:],
            "queue_bytes": sum(max(0, f["copied_bytes"] - f["written_bytes"]) for f in self._in_flight.values()),
            "written_bytes": self._written_bytes,
            "bytes_per_s": sum(n for _, n in self._recent) / _RATE_WINDOW_S,
            "num_committed": self._num_committed,
            "num_failed": self._num_failed,
            "last": self._last,
        }
        try:
            if is_first:
                remove_stale(self._root)
            _replace(self._path, json.dumps(document).encode())
        except OSError as error:
            if not self._is_reported:
                logger.warning("the status file %r cannot be written (checkpoints are not affected): %s", self._path, error)
                self._is_reported = True


def _new_flying(tag: str) -> dict[str, Any]:
    return {"tag": tag, "since_unix_s": time.time(), "copied_bytes": 0, "written_bytes": 0, "stall_s": 0.0}


def _replace(path: str, data: bytes) -> None:
    fresh = path + ".new"
    # O_NOFOLLOW and no O_EXCL: a left-over of our own name is overwritten, a planted link is refused.
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    os.replace(fresh, path)


def _remove_own(path: str, pid: int) -> None:
    if os.getpid() != pid:
        return
    for name in (path, path + ".new"):
        try:
            os.unlink(name)
        except OSError as error:
            if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
                logger.warning("the status file %r could not be removed: %s", name, error)


def remove_stale(root: str, filesystem: FileSystem | None = None) -> list[str]:
    """Remove the status files of processes that are certainly gone; returns their names. Blocks.

    Raises:
        OSError: the root cannot be listed, or a file not removed.
    """
    fs = LocalFileSystem() if filesystem is None else filesystem
    removed = []
    for name in fs.listdir(root):
        owner = parse_status_name(name.removesuffix(".new"))
        if owner is not None and fs.owner_state(owner) in _GONE:
            fs.unlink(os.path.join(root, name))
            removed.append(name)
    return removed


@dataclass(frozen=True, slots=True)
class Status:
    """One process's published state, checked field by field; see `StatusObserver` for the meaning."""

    owner: Owner
    owner_state: OwnerState
    updated_unix_s: float
    in_flight: tuple[dict[str, Any], ...]
    queue_bytes: int
    written_bytes: int
    bytes_per_s: float
    num_committed: int
    num_failed: int
    last: dict[str, Any] | None


def read_statuses(root: str, filesystem: FileSystem | None = None) -> list[Status]:
    """Every readable status in `root`, oldest first; damaged and foreign files are left out with a log record. Blocks.

    Raises:
        OSError: the root cannot be listed.
    """
    fs = LocalFileSystem() if filesystem is None else filesystem
    found = []
    for name in sorted(fs.listdir(root)):
        owner = parse_status_name(name)
        if owner is None:
            continue
        try:
            document = json.loads(fs.read_file(os.path.join(root, name), MAX_STATUS_BYTES))
            found.append(_status(owner, fs.owner_state(owner), document))
        except FileNotFoundError:
            continue
        except (OSError, CheckpointError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            logger.warning("%r is left out: %s", name, error)
    return sorted(found, key=lambda status: status.updated_unix_s)


def _status(owner: Owner, state: OwnerState, document: Any) -> Status:
    if document["format"] != "async-ckpt-status" or document["format_version"] != _VERSION:
        raise ValueError("not a status file of this version")
    flying = ("tag", "since_unix_s", "copied_bytes", "written_bytes", "stall_s")
    last = ("tag", "error", "ended_unix_s", "size_bytes", "stall_s", "total_s", "bytes_per_s", "backpressure_s")
    return Status(
        owner=owner,
        owner_state=state,
        updated_unix_s=float(document["updated_unix_s"]),
        in_flight=tuple(_fields(item, flying) for item in document["in_flight"][:64]),
        queue_bytes=int(document["queue_bytes"]),
        written_bytes=int(document["written_bytes"]),
        bytes_per_s=float(document["bytes_per_s"]),
        num_committed=int(document["num_committed"]),
        num_failed=int(document["num_failed"]),
        last=None if document["last"] is None else _fields(document["last"], last),
    )


def _fields(item: Any, names: tuple[str, ...]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for name in names:
        value = item[name]
        is_text = name in ("tag", "error")
        checked[name] = (None if value is None else str(value)[:1000]) if is_text else float(value)
    return checked
