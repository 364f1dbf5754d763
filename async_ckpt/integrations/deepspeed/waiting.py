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
import functools
import importlib
import os
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...engine.pending import PendingCommit
from ...host.device import THREAD_PREFIX


@dataclass(eq=False, slots=True)
class SavedCheckpoint:
    """A checkpoint whose saves are over, until its engine has reported how it ended.

    One that was given up on this rank (`pending` is None, `error` says why) keeps its place, so that the ranks go on
    counting alike.
    """

    number: int
    info: Any
    folder: str
    """Where it will be: a real path."""
    pending: PendingCommit | None
    error: BaseException | None
    is_raised: bool
    patience_s: float
    is_told: bool = False
    """Whether a reader was told of its failure, on this rank alone perhaps."""

    def loss(self) -> BaseException | None:
        """Block until it has ended; what is to be raised."""
        return self.error if self.pending is None else self.pending.loss(self.patience_s)


_coming: dict[str, SavedCheckpoint] = {}
"""The newest of each folder, on its way or failed and not reported yet."""

os.register_at_fork(after_in_child=_coming.clear)


def announce(saved: SavedCheckpoint) -> None:
    """From now on, readers wait for it, and are told if it fails."""
    _coming[saved.folder] = saved
    if saved.pending is not None:
        saved.pending.when_done(lambda ended: forget(saved) if ended.verdict is None else None)


def forget(saved: SavedCheckpoint) -> None:
    """There is nothing to wait for or to tell any more. Any thread."""
    if _coming.get(saved.folder) is saved:
        _coming.pop(saved.folder, None)


def install() -> None:
    """Let the readers of this process wait."""
    for module, name, first in (
        # What every way into these tools goes through, before it looks at the disk.
        ("deepspeed.utils.zero_to_fp32", "get_fp32_state_dict_from_zero_checkpoint", _wait_for_all),
        ("deepspeed.checkpoint.ds_to_universal", "main", _wait_for_all),
        # What `torch.load` opens a file with: the function itself is held by partials and classes, and pickled by its
        # name.
        ("torch.serialization", "_open_file_like", _wait_for_file),
    ):
        with contextlib.suppress(ImportError, AttributeError):
            reader = getattr(importlib.import_module(module), name)
            if not hasattr(reader, "_is_async_ckpt"):
                _put_in_place(reader, _waiting(reader, first))


def wait(path: str | None = None, *, on_every_rank: bool = False) -> None:
    """Block until no checkpoint of this process is on its way; with `path`, none that will hold it. Any thread.

    Args:
        on_every_rank: all ranks call this, and raise alike, whatever one of them was told before.

    Raises:
        CheckpointError: one of them failed; its own engine raises it too.
    """
    if threading.current_thread().name.startswith(THREAD_PREFIX):
        return
    for folder, saved in list(_coming.items()):
        if (path is None or path.startswith(folder + os.sep)) and (on_every_rank or not saved.is_told):
            error = saved.loss()
            if error is not None:
                saved.is_told = True
                if on_every_rank:
                    forget(saved)
                raise error


def _wait_for_all(*_: Any, **__: Any) -> None:
    wait()


def _wait_for_file(file: Any, mode: str) -> None:
    if _coming and mode == "rb" and isinstance(file, (str, os.PathLike)):
        path = os.fsdecode(file)
        # A descriptor's name is that of a file which is there.
        if not path.startswith("/proc/"):
            wait(os.path.realpath(path))


def _waiting(reader: Any, first: Callable[..., None]) -> Any:
    @functools.wraps(reader)
    def waits_first(*args: Any, **kwargs: Any) -> Any:
        first(*args, **kwargs)
        return reader(*args, **kwargs)

    waits_first._is_async_ckpt = True  # type: ignore[attr-defined]
    return waits_first


def _put_in_place(tool: Any, wrapper: Any) -> None:
    """Wherever a module holds `tool` under any name, give it `wrapper`."""
    for module in list(sys.modules.values()):
        # Modules of other kinds may load themselves when they are looked at.
        if type(module) is types.ModuleType:
            for name in [name for name, value in vars(module).items() if value is tool]:
                setattr(module, name, wrapper)
