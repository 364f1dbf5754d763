"""Where tests look inside an engine, a pool or a guard: the one place that knows their private names."""

from __future__ import annotations

import threading
from typing import Any


def threads_left(timeout_s: float = 10.0) -> list[str]:
    """The names of the package's threads that do not end by themselves."""
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("async-ckpt")]
    for thread in threads:
        thread.join(timeout_s)
    return [thread.name for thread in threads if thread.is_alive()]


def arena_of(holder: Any) -> Any:
    """The staging memory of an engine or a stager."""
    return pipeline_of(holder).arena if hasattr(holder, "_commits") else holder._arena


def commits_of(engine: Any) -> Any:
    """The commits of an engine: pool, rotation, open checkpoints."""
    return engine._commits


def pipeline_of(engine: Any) -> Any:
    """What copies and writes for an engine."""
    return commits_of(engine).pipeline


def guard_of(engine: Any) -> Any:
    """The guard of an engine."""
    return pipeline_of(engine).guard


def exclusion_of(guard: Any) -> Any:
    """What keeps steps and saves of a guard apart."""
    return guard._exclusion


def thread_of(holder: Any) -> Any:
    """The loop thread of a pool, or the thread of that."""
    return holder._thread
