"""Reading committed files back. The modules that need no torch stay usable without it: names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loading import Restored, load, load_committed, load_committed_into, load_into, load_opened

__all__ = ["Restored", "load", "load_committed", "load_committed_into", "load_into", "load_opened"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".loading", __name__), name)
