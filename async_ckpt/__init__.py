"""Asynchronous background checkpoint writer for PyTorch training.

`save()` costs a training step next to nothing, `commit(tag)` makes the checkpoint durable and visible in one atomic
rename, and no failure is silent. Public names load on first use, so that ``import async_ckpt`` and `Catalog` need no torch.
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

if TYPE_CHECKING:
    from .catalog import Catalog
    from .config import EngineConfig
    from .engine import AsyncCheckpointEngine
    from .interface import CheckpointEngine
    from .metrics import CommitMetrics, Observer, SaveMetrics, Span
    from .pacing import CheckpointPacer
    from .pending import PendingCommit
    from .preemption import PreemptionOutcome
    from .restore import load, load_into
    from .retention import KeepBest, KeepEvery, KeepLast, KeepNewerThan

__version__ = "0.1.0"

_HOME = {
    "AsyncCheckpointEngine": "engine",
    "Catalog": "catalog",
    "CheckpointEngine": "interface",
    "CheckpointPacer": "pacing",
    "CommitMetrics": "metrics",
    "EngineConfig": "config",
    "KeepBest": "retention",
    "KeepEvery": "retention",
    "KeepLast": "retention",
    "KeepNewerThan": "retention",
    "Observer": "metrics",
    "PendingCommit": "pending",
    "PreemptionOutcome": "preemption",
    "SaveMetrics": "metrics",
    "Span": "metrics",
    "load": "restore",
    "load_into": "restore",
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
    "ConfigError",
    "CorruptCheckpointError",
    "EngineConfig",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "KeepNewerThan",
    "Observer",
    "OutOfSpaceError",
    "PathExistsError",
    "PendingCommit",
    "PreemptionOutcome",
    "RankFailedError",
    "SaveMetrics",
    "Span",
    "StateMismatchError",
    "TagExistsError",
    "TornSnapshotError",
    "TransactionStateError",
    "UnsafePathError",
    "UnsupportedStateError",
    "WriteError",
    "load",
    "load_into",
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
