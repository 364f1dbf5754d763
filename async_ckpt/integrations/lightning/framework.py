"""Lightning itself: which of its two packages is there, and what `ModelCheckpoint` must learn about pending files.

`ModelCheckpoint` looks at the disk to choose a free file name, and points ``last.ckpt`` at a file in the moment it is
saved. Neither is right for a file that is still on its way, and a plugin is not asked: so the two methods are wrapped,
`setup` too, which is the first to know the directory (staging memory is prepared then instead of in the first save),
and `on_train_start`, the first to know the optimizers. They behave as before under every trainer whose plugin is not
ours.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from typing import Any, Protocol, runtime_checkable

_PACKAGES = (("lightning.fabric", "lightning.pytorch"), ("lightning_fabric", "pytorch_lightning"))


@runtime_checkable
class KnowsPending(Protocol):
    """What the wrapped methods ask of the plugin."""

    def is_pending(self, path: Any) -> bool:
        """Whether a save to `path` has not ended yet."""

    def link(self, target: Any, link: Any) -> None:
        """Point the symbolic link at `target` once that is committed."""

    def prepare(self, dirpath: Any) -> None:
        """Make ready for saves to this directory."""

    def fit_started(self, optimizers: Any, module: Any) -> None:
        """Training begins, with these optimizers."""


def checkpoint_io_class() -> Any:
    """Lightning's abstract `CheckpointIO`, of the package that is in use.

    Raises:
        ImportError: neither package is there; names the extra.
    """
    used = sorted(_PACKAGES, key=lambda package: package[0].split(".")[0] not in sys.modules)
    failures = []
    for fabric, _ in used:
        try:
            return importlib.import_module(f"{fabric}.plugins").CheckpointIO
        except ImportError as error:
            failures.append(str(error))
    hint = "install it with: pip install 'async-ckpt[lightning]'"
    raise ImportError(
        f"the Lightning integration needs lightning, which cannot be imported ({'; '.join(failures)}); {hint}"
    )


def cooperate(plugin_class: Any) -> None:
    """Let every loaded Lightning package take `plugin_class` for a `CheckpointIO`, and its callback ask it.
    Idempotent.
    """
    for fabric, pytorch in _PACKAGES:
        if f"{fabric}.plugins" in sys.modules:
            sys.modules[f"{fabric}.plugins"].CheckpointIO.register(plugin_class)
        # Whoever has a Trainer has imported this already.
        if pytorch in sys.modules:
            _teach(importlib.import_module(f"{pytorch}.callbacks").ModelCheckpoint)


def default_weights_only() -> bool | None:
    """What this Lightning passes to ``torch.load`` for a local file unless told otherwise: False before 2.6."""
    for fabric, _ in _PACKAGES:
        module = sys.modules.get(f"{fabric}.plugins")
        if (
            module is not None
            and "weights_only" in inspect.signature(module.TorchCheckpointIO.load_checkpoint).parameters
        ):
            return None
    return False


def _teach(callback_class: Any) -> None:
    if getattr(callback_class.file_exists, "_is_async_ckpt", False):
        return
    stock_exists, stock_link = callback_class.file_exists, callback_class._link_checkpoint
    stock_setup, stock_start = callback_class.setup, callback_class.on_train_start

    @functools.wraps(stock_exists)
    def file_exists(self: Any, filepath: Any, trainer: Any) -> bool:
        exists = bool(stock_exists(self, filepath, trainer))
        plugin = trainer.strategy.checkpoint_io
        if exists or not isinstance(plugin, KnowsPending):
            return exists
        # Every rank gets the answer of the one that saves.
        return bool(trainer.strategy.broadcast(trainer.is_global_zero and plugin.is_pending(filepath)))

    @functools.wraps(stock_link)
    def link_checkpoint(trainer: Any, filepath: str, linkpath: str) -> None:
        plugin = trainer.strategy.checkpoint_io
        if not isinstance(plugin, KnowsPending):
            stock_link(trainer, filepath, linkpath)
            return
        if trainer.is_global_zero:
            plugin.link(filepath, linkpath)
        trainer.strategy.barrier()

    @functools.wraps(stock_setup)
    def setup(self: Any, trainer: Any, pl_module: Any, stage: str) -> None:
        stock_setup(self, trainer, pl_module, stage)
        plugin = trainer.strategy.checkpoint_io
        if isinstance(plugin, KnowsPending) and trainer.is_global_zero and stage == "fit" and not trainer.fast_dev_run:
            plugin.prepare(self.dirpath)

    @functools.wraps(stock_start)
    def on_train_start(self: Any, trainer: Any, pl_module: Any) -> None:
        stock_start(self, trainer, pl_module)
        plugin = trainer.strategy.checkpoint_io
        if isinstance(plugin, KnowsPending):
            plugin.fit_started(trainer.optimizers, pl_module)

    file_exists._is_async_ckpt = True  # type: ignore[attr-defined]
    callback_class.setup = setup
    callback_class.on_train_start = on_train_start
    callback_class.file_exists = file_exists
    callback_class._link_checkpoint = staticmethod(link_checkpoint)
