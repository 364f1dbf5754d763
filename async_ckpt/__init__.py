"""Asynchronous background checkpoint writer for PyTorch training.

`save()` costs a training step next to nothing, `commit(tag)` makes the checkpoint durable and visible in one atomic
rename, and no failure is silent. Public names load on first use, so that ``import async_ckpt`` and `Catalog` need no
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .storage.filesystem import ReadSide, open_urls_with

if TYPE_CHECKING:
    # `X as X` makes a name public for type checkers.
    from .engine.config import EngineConfig as EngineConfig
    from .engine.engine import AsyncCheckpointEngine as AsyncCheckpointEngine
    from .engine.interface import CheckpointEngine as CheckpointEngine
    from .engine.pacing import CheckpointPacer as CheckpointPacer
    from .engine.pending import PendingCommit as PendingCommit
    from .engine.pending import Tolerate as Tolerate
    from .engine.preemption import PreemptionOutcome as PreemptionOutcome
    from .engine.preemption import ignore_preemption as ignore_preemption
    from .errors import BackpressureTimeout as BackpressureTimeout
    from .errors import CheckpointError as CheckpointError
    from .errors import CheckpointNotFoundError as CheckpointNotFoundError
    from .errors import CommitError as CommitError
    from .errors import ConfigError as ConfigError
    from .errors import CorruptCheckpointError as CorruptCheckpointError
    from .errors import MirrorError as MirrorError
    from .errors import OutOfSpaceError as OutOfSpaceError
    from .errors import PathExistsError as PathExistsError
    from .errors import RankFailedError as RankFailedError
    from .errors import StateMismatchError as StateMismatchError
    from .errors import TagExistsError as TagExistsError
    from .errors import TornSnapshotError as TornSnapshotError
    from .errors import TransactionStateError as TransactionStateError
    from .errors import UnsafePathError as UnsafePathError
    from .errors import UnsupportedStateError as UnsupportedStateError
    from .errors import WriteError as WriteError
    from .host.facts import Node as Node
    from .metrics import CommitMetrics as CommitMetrics
    from .metrics import MirrorMetrics as MirrorMetrics
    from .metrics import Observer as Observer
    from .metrics import SaveMetrics as SaveMetrics
    from .metrics import Span as Span
    from .mirror.config import Mirror as Mirror
    from .mirror.pending import PendingMirror as PendingMirror
    from .observers.progress import CommitProgress as CommitProgress
    from .observers.progress import show_progress as show_progress
    from .observers.reports import LoggingObserver as LoggingObserver
    from .observers.reports import PrometheusObserver as PrometheusObserver
    from .observers.reports import TensorBoardObserver as TensorBoardObserver
    from .observers.trace import SpanRecorder as SpanRecorder
    from .observers.trace import TraceObserver as TraceObserver
    from .observers.trace import read_trace as read_trace
    from .observers.trace import write_timeline as write_timeline
    from .ranks.rank_coordinator import RankCoordinator as RankCoordinator
    from .reading.catalog import Catalog as Catalog
    from .reading.load import load as load
    from .reading.load import load_into as load_into
    from .retention import KeepBest as KeepBest
    from .retention import KeepEvery as KeepEvery
    from .retention import KeepLast as KeepLast
    from .retention import KeepNewerThan as KeepNewerThan

__version__ = "0.1.0"

_HOMES = {
    "engine.config": "EngineConfig",
    "engine.engine": "AsyncCheckpointEngine",
    "engine.interface": "CheckpointEngine",
    "engine.pacing": "CheckpointPacer",
    "engine.pending": "PendingCommit Tolerate",
    "engine.preemption": "PreemptionOutcome ignore_preemption",
    "errors": "BackpressureTimeout CheckpointError CheckpointNotFoundError CommitError ConfigError MirrorError "
    "CorruptCheckpointError OutOfSpaceError PathExistsError RankFailedError StateMismatchError TagExistsError "
    "TornSnapshotError TransactionStateError UnsafePathError UnsupportedStateError WriteError",
    "host.facts": "Node",
    "metrics": "CommitMetrics MirrorMetrics Observer SaveMetrics Span",
    "mirror.config": "Mirror",
    "mirror.pending": "PendingMirror",
    "observers.progress": "CommitProgress show_progress",
    "observers.reports": "LoggingObserver PrometheusObserver TensorBoardObserver",
    "observers.trace": "SpanRecorder TraceObserver read_trace write_timeline",
    "ranks.rank_coordinator": "RankCoordinator",
    "reading.catalog": "Catalog",
    "reading.load": "load load_into",
    "retention": "KeepBest KeepEvery KeepLast KeepNewerThan",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)


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
