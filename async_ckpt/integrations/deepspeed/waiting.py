"""Whoever reads checkpoints in this process first waits for those that are on their way: another engine, or one of
DeepSpeed's tools.

Stock DeepSpeed's files are there when `save_checkpoint` returns. So another attached engine's `load_checkpoint`,
``zero_to_fp32`` and ``ds_to_universal`` must find them, if they are called right after it.
"""

from __future__ import annotations

import contextlib
import importlib
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import AsyncDeepSpeedEngine

_engines: weakref.WeakSet[AsyncDeepSpeedEngine] = weakref.WeakSet()

_TOOLS = ("deepspeed.utils.zero_to_fp32", "deepspeed.checkpoint.ds_to_universal")


def note(engine: AsyncDeepSpeedEngine) -> None:
    """From now on, readers wait for this engine's checkpoints."""
    _engines.add(engine)
    for name in _TOOLS:
        with contextlib.suppress(ImportError):
            module: Any = importlib.import_module(name)
            # Their functions may have been imported by name already: what all of them look up first is this.
            if not isinstance(module.os, _WaitingModule):
                module.os = _WaitingModule(module.os)


def wait() -> None:
    """Block until no checkpoint of this process is on its way.

    Raises:
        CheckpointError: one of them failed; its own engine raises it too.
    """
    for engine in list(_engines):
        for pending in engine.pending():
            error = pending.exception(engine.patience_s)
            if error is not None:
                raise error


class _WaitingModule:
    """A module; whoever looks something up in it waits first."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        wait()
        return getattr(self._module, name)
