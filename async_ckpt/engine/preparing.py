"""What is made ready before it is saved: sub-directories, plans and staging memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import PathExistsError
from ..format.names import StrPath
from . import preflight
from .commits import Commits
from .config import EngineConfig


def make_directory(commits: Commits, path: StrPath, *, exist_ok: bool) -> None:
    """See `AsyncCheckpointEngine.makedirs`."""
    with commits.lock:
        commits.check_usable()
        if commits.paths.is_named_by(path):
            is_new, what = False, f"the checkpoint root {commits.root!r}"
        else:
            checkpoint, parts = commits.locate(path)
            is_new = checkpoint.add_directory(parts)
            what = f"directory {'/'.join(parts) or '.'!r} of the open checkpoint {checkpoint.tag!r}"
        if not is_new and not exist_ok:
            raise PathExistsError(f"{what} exists already")


def prewarm(commits: Commits, config: EngineConfig, state_bytes: int | None, states: Mapping[str, Any] | None) -> None:
    """See `AsyncCheckpointEngine.prewarm`."""
    pipeline = commits.pipeline
    with commits.lock:
        commits.check_usable()
        named = {"/".join(commits.paths.split(path)[1]): state for path, state in (states or {}).items()}
        planned_bytes, size_bytes = pipeline.plan_ahead(named)
    pipeline.tell_notes()
    preflight.for_states(config, commits.catalog, commits.filesystem, size_bytes)
    pipeline.fault_in(planned_bytes if state_bytes is None and states else state_bytes)
