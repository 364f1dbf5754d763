"""Asynchronous background checkpoint writer for PyTorch training.

`save()` costs a training step next to nothing, `commit(tag)` makes the checkpoint durable and visible in one atomic
rename, and no failure is silent. Public names load on first use, so that ``import async_ckpt`` and `Catalog` need no
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .errors import (
    BackpressureTimeout,
    CheckpointError,
    CheckpointNotFoundError,
    CommitError,
    ConfigError,
    CorruptCheckpointError,
    MirrorError,
    OutOfSpaceError,
    PathExistsError,
    RankFailedError,
    StateMismatchError,
    TagExistsError,
    TornSnapshotError,
    TransactionStateError,
    UnsafePathError,
    UnsupportedStateError,
    WriteError,
)
from .storage.filesystem import ReadSide, open_urls_with

if TYPE_CHECKING:
    from .engine.config import EngineConfig
    from .engine.engine import AsyncCheckpointEngine
    from .engine.interface import CheckpointEngine
    from .engine.pacing import CheckpointPacer
    from .engine.pending import PendingCommit
    from .engine.preemption import PreemptionOutcome, ignore_preemption
    from .engine.tolerance import Tolerate
    from .host.facts import Node
    from .metrics import CommitMetrics, MirrorMetrics, Observer, SaveMetrics, Span
    from .mirror.config import Mirror
    from .mirror.pending import PendingMirror
    from .observers.progress import CommitProgress, show_progress
    from .observers.reports import LoggingObserver, PrometheusObserver, TensorBoardObserver
    from .observers.trace import SpanRecorder, TraceObserver, read_trace, write_timeline
    from .ranks.rank_coordinator import RankCoordinator
    from .reading.catalog import Catalog
    from .reading.load import load, load_into
    from .retention import KeepBest, KeepEvery, KeepLast, KeepNewerThan

__version__ = "0.1.0"

_HOME = {
    "AsyncCheckpointEngine": "engine.engine",
    "Catalog": "reading.catalog",
    "CheckpointEngine": "engine.interface",
    "CheckpointPacer": "engine.pacing",
    "CommitMetrics": "metrics",
    "CommitProgress": "observers.progress",
    "EngineConfig": "engine.config",
    "KeepBest": "retention",
    "KeepEvery": "retention",
    "KeepLast": "retention",
    "KeepNewerThan": "retention",
    "LoggingObserver": "observers.reports",
    "Mirror": "mirror.config",
    "MirrorMetrics": "metrics",
    "Node": "host.facts",
    "Observer": "metrics",
    "PendingCommit": "engine.pending",
    "PendingMirror": "mirror.pending",
    "PreemptionOutcome": "engine.preemption",
    "PrometheusObserver": "observers.reports",
    "RankCoordinator": "ranks.rank_coordinator",
    "SaveMetrics": "metrics",
    "Span": "metrics",
    "SpanRecorder": "observers.trace",
    "TensorBoardObserver": "observers.reports",
    "Tolerate": "engine.tolerance",
    "TraceObserver": "observers.trace",
    "ignore_preemption": "engine.preemption",
    "load": "reading.load",
    "load_into": "reading.load",
    "read_trace": "observers.trace",
    "show_progress": "observers.progress",
    "write_timeline": "observers.trace",
}

__all__ = [
    "AsyncCheckpointEngine",
    "BackpressureTimeout",
    "Catalog",
    "CheckpointEngine",
    "CheckpointError",
    "CheckpointNotFoundError",
    "CheckpointPacer",
    "CommitError",
    "CommitMetrics",
    "CommitProgress",
    "ConfigError",
    "CorruptCheckpointError",
    "EngineConfig",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepNewerThan",
    "LoggingObserver",
    "Mirror",
    "MirrorError",
    "MirrorMetrics",
    "Node",
    "Observer",
    "OutOfSpaceError",
    "PathExistsError",
    "PendingCommit",
    "PendingMirror",
    "PreemptionOutcome",
    "PrometheusObserver",
    "RankCoordinator",
    "RankFailedError",
    "SaveMetrics",
    "Span",
    "SpanRecorder",
    "StateMismatchError",
    "TagExistsError",
    "TensorBoardObserver",
    "Tolerate",
    "TornSnapshotError",
    "TraceObserver",
    "TransactionStateError",
    "UnsafePathError",
    "UnsupportedStateError",
    "WriteError",
    "ignore_preemption",
    "load",
    "load_into",
    "read_trace",
    "show_progress",
    "write_timeline",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _open_url(url: str) -> ReadSide:
    from .mirror.remote import open_url

    return open_url(url)


open_urls_with(_open_url)
