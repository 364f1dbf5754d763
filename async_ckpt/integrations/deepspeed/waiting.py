"""Whoever reads checkpoints in this process first waits for those that are on their way.

Stock DeepSpeed's files are there when `save_checkpoint` returns. So another attached engine's `load_checkpoint`, and
DeepSpeed's tools ``zero_to_fp32`` and ``ds_to_universal``, must find them if they are called right after it: `attach`
wraps these functions, in every module that has imported them.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
import weakref
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import AsyncDeepSpeedEngine

_engines: weakref.WeakSet[AsyncDeepSpeedEngine] = weakref.WeakSet()

# What every way into these tools goes through, before it looks at the disk.
_TOOLS = {
    "deepspeed.utils.zero_to_fp32": "get_fp32_state_dict_from_zero_checkpoint",
    "deepspeed.checkpoint.ds_to_universal": "main",
}


def note(engine: AsyncDeepSpeedEngine) -> None:
    """From now on, readers wait for this engine's checkpoints."""
    _engines.add(engine)
    for module, name in _TOOLS.items():
        with contextlib.suppress(ImportError):
            tool = getattr(importlib.import_module(module), name)
            if not hasattr(tool, "_is_async_ckpt"):
                _put_in_place(tool, _waiting(tool))


def wait() -> None:
    """Block until no checkpoint of this process is on its way.

    Raises:
        CheckpointError: one of them failed; its own engine raises it too.
    """
    for engine in list(_engines):
        for pending in engine.pending():
            error = pending.loss(engine.patience_s)
            if error is not None:
                raise error


def _waiting(tool: Any) -> Any:
    @functools.wraps(tool)
    def waits_first(*args: Any, **kwargs: Any) -> Any:
        wait()
        return tool(*args, **kwargs)

    waits_first._is_async_ckpt = True  # type: ignore[attr-defined]
    return waits_first


def _put_in_place(tool: Any, wrapper: Any) -> None:
    """Wherever a module holds `tool` under any name, give it `wrapper`."""
    for module in list(sys.modules.values()):
        # Modules of other kinds may load themselves when they are looked at.
        if type(module) is types.ModuleType:
            for name in [name for name, value in vars(module).items() if value is tool]:
                setattr(module, name, wrapper)
