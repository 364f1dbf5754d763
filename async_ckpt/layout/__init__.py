"""Memory side: which bytes, at which offset.

`zipformat` needs no torch; the names below load on first use, so that readers stay free of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .opaque import opaque_state
    from .plan import FilePlan, PlannedState, Source, Sources
    from .planner import Planner
    from .sealer import Sealer

__all__ = ["FilePlan", "PlannedState", "Planner", "Sealer", "Source", "Sources", "opaque_state"]

_HOMES = {"Planner": "planner", "Sealer": "sealer", "opaque_state": "opaque"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES.get(name, 'plan')}", __name__), name)
