"""Whoever reads checkpoints in this process first waits for those that are on their way.

Stock DeepSpeed's files are there when `save_checkpoint` returns. So another attached engine's `load_checkpoint`,
``torch.load`` and DeepSpeed's tools ``zero_to_fp32`` and ``ds_to_universal`` must find them if they are called right
after it: `attach` wraps these functions, in every module that has imported them.

Guarantees:
- Each failure is raised by the first reader that needs the checkpoint, and by its own engine all the same.
- The package's own threads never wait here, nor does a forked child: what is on its way is its parent's.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import threading
import types
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...engine.pending import PendingCommit
from ...host.device import THREAD_PREFIX
from ..frameworks import wrapped
from .destination import DeepSpeedDestination


@dataclass(eq=False)
class Save:
    """One save, from DeepSpeed's `create` until its outcome was reported. One that was given up keeps its place, so
    that the ranks go on counting alike."""

    info: Any
    destination: DeepSpeedDestination
    patience_s: float
    is_open: bool = False
    """Whether the engine has it open."""
    pending: PendingCommit | None = None
    error: BaseException | None = None
    """Its first failure on this rank: why it is given up."""
    is_raised: bool = False
    is_told: bool = False
    """Whether a reader was told of its failure, on this rank alone perhaps."""

    @cached_property
    def folder(self) -> str:
        """Where it will be: a real path."""
        return os.path.realpath(self.destination.folder)

    def loss(self) -> BaseException | None:
        """Block until it has ended; what is to be raised."""
        return self.error if self.pending is None else self.pending.loss(self.patience_s)


_coming: dict[str, Save] = {}
"""The newest of each folder, on its way or failed and not reported yet."""

os.register_at_fork(after_in_child=_coming.clear)


def announce(save: Save) -> None:
    """From now on, readers wait for it, and are told if it fails."""
    _coming[save.folder] = save
    if save.pending is not None:
        save.pending.when_done(lambda ended: forget(save) if ended.verdict is None else None)


def forget(save: Save) -> None:
    """There is nothing to wait for or to tell any more. Any thread."""
    if _coming.get(save.folder) is save:
        _coming.pop(save.folder, None)


def install() -> None:
    """Let the readers of this process wait."""
    for module, name, around in (
        # What every way into these tools goes through, before it looks at the disk.
        ("deepspeed.utils.zero_to_fp32", "get_fp32_state_dict_from_zero_checkpoint", _after_all),
        ("deepspeed.checkpoint.ds_to_universal", "main", _after_all),
        # What `torch.load` opens a file with: the function itself is held by partials and classes, and pickled by its
        # name.
        ("torch.serialization", "_open_file_like", _after_file),
    ):
        with contextlib.suppress(ImportError, AttributeError):
            reader = getattr(importlib.import_module(module), name)
            _put_in_place(reader, wrapped(reader, around))


def wait(path: str | None = None, *, on_every_rank: bool = False) -> None:
    """Block until no checkpoint of this process is on its way; with `path`, none that will hold it. Any thread. With
    `on_every_rank`, all ranks call this, and raise alike, whatever one of them was told before. Raises CheckpointError:
    one of them failed; its own engine raises it too."""
    if threading.current_thread().name.startswith(THREAD_PREFIX):
        return
    for folder, save in list(_coming.items()):
        if (path is None or path.startswith(folder + os.sep)) and (on_every_rank or not save.is_told):
            error = save.loss()
            if error is not None:
                save.is_told = True
                if on_every_rank:
                    forget(save)
                raise error


def _after_all(reader: Any, *args: Any, **kwargs: Any) -> Any:
    wait()
    return reader(*args, **kwargs)


def _after_file(reader: Any, file: Any, mode: str) -> Any:
    if _coming and mode == "rb" and isinstance(file, (str, os.PathLike)):
        path = os.fsdecode(file)
        # A descriptor's name is that of a file which is there.
        if not path.startswith("/proc/"):
            wait(os.path.realpath(path))
    return reader(file, mode)


def _put_in_place(tool: Any, wrapper: Any) -> None:
    """Wherever a module holds `tool` under any name, give it `wrapper`."""
    for module in list(sys.modules.values()):
        # Modules of other kinds may load themselves when they are looked at.
        if type(module) is types.ModuleType:
            for name in [name for name, value in vars(module).items() if value is tool]:
                setattr(module, name, wrapper)
