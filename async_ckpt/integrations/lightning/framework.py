"""Lightning itself: which of its two packages is there, and what `ModelCheckpoint` must learn about pending files.

`ModelCheckpoint` looks at the disk to choose a free file name, and points ``last.ckpt`` at a file in the moment it is
saved. Neither is right for a file that is still on its way, and a plugin is not asked: so the two methods are wrapped,
`setup` too, which is the first to know the directory (staging memory is prepared then instead of in the first save),
and `on_train_start`, the first to know the optimizers. They behave as before under every trainer whose plugin is not
ours.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

from ..frameworks import require, wrapped

_PACKAGES = (("lightning.fabric", "lightning.pytorch"), ("lightning_fabric", "pytorch_lightning"))


def checkpoint_io_class() -> Any:
    """Lightning's abstract `CheckpointIO`, of the package that is in use. Raises ImportError: there is neither."""
    used = sorted(_PACKAGES, key=lambda package: package[0].split(".")[0] not in sys.modules)
    return require("lightning", *(f"{fabric}.plugins" for fabric, _ in used)).CheckpointIO


def cooperate(plugin_class: Any) -> None:
    """Let every loaded Lightning package take `plugin_class` for a `CheckpointIO`, and its callback ask it.
    Idempotent.
    """
    for fabric, pytorch in _PACKAGES:
        if f"{fabric}.plugins" in sys.modules:
            sys.modules[f"{fabric}.plugins"].CheckpointIO.register(plugin_class)
        # Whoever has a Trainer has imported this already.
        if pytorch in sys.modules:
            _teach(importlib.import_module(f"{pytorch}.callbacks").ModelCheckpoint, plugin_class)


def default_weights_only() -> bool | None:
    """What this Lightning passes to ``torch.load`` for a local file unless told otherwise: False before 2.6."""
    for fabric, _ in _PACKAGES:
        module = sys.modules.get(f"{fabric}.plugins")
        load = None if module is None else module.TorchCheckpointIO.load_checkpoint
        if load is not None and "weights_only" in inspect.signature(load).parameters:
            return None
    return False


def _teach(callback_class: Any, plugin_class: Any) -> None:
    def plugin_of(trainer: Any) -> Any:
        plugin = trainer.strategy.checkpoint_io
        return plugin if isinstance(plugin, plugin_class) else None

    def file_exists(stock: Any, callback: Any, filepath: Any, trainer: Any) -> bool:
        exists = bool(stock(callback, filepath, trainer))
        plugin = plugin_of(trainer)
        if exists or plugin is None:
            return exists
        # Every rank gets the answer of the one that saves.
        return bool(trainer.strategy.broadcast(trainer.is_global_zero and plugin.is_pending(filepath)))

    def link_checkpoint(stock: Any, trainer: Any, filepath: str, linkpath: str) -> None:
        plugin = plugin_of(trainer)
        if plugin is None:
            stock(trainer, filepath, linkpath)
            return
        if trainer.is_global_zero:
            plugin.link(filepath, linkpath)
        trainer.strategy.barrier()

    def setup(stock: Any, callback: Any, trainer: Any, pl_module: Any, stage: str) -> None:
        stock(callback, trainer, pl_module, stage)
        plugin = plugin_of(trainer)
        if plugin is not None and trainer.is_global_zero and stage == "fit" and not trainer.fast_dev_run:
            plugin.prepare(callback.dirpath)

    def on_train_start(stock: Any, callback: Any, trainer: Any, pl_module: Any) -> None:
        stock(callback, trainer, pl_module)
        plugin = plugin_of(trainer)
        if plugin is not None:
            plugin.fit_started(trainer.optimizers, pl_module)

    for around in (file_exists, setup, on_train_start):
        setattr(callback_class, around.__name__, wrapped(getattr(callback_class, around.__name__), around))
    callback_class._link_checkpoint = staticmethod(wrapped(callback_class._link_checkpoint, link_checkpoint))
