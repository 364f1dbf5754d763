"""Where a rank learns its run's name: torchrun's environment, or its store."""

from __future__ import annotations

import os
from typing import Any

from ..errors import ConfigError


def default_run_id(store: Any) -> str:
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is not None:
        return f"{run_id}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    inner = store
    while hasattr(inner, "underlying_store"):
        inner = inner.underlying_store
    if type(inner).__name__ == "FileStore":
        raise ConfigError(
            "a FileStore keeps the keys of earlier runs: give run_id, the same on all ranks and new in every run"
        )
    return "run"
