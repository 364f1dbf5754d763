"""Turns the files that a framework saves into files of an open checkpoint.

The framework's own code runs as it is, with a scratch directory for its output, so that whatever it or a subclass
saves is saved (adapters, shards, tokenizers, code). Its two ways of writing tensors, ``torch.save`` and
``safetensors.torch.save_file``, are exchanged meanwhile for ones that snapshot into the engine; what reaches the
scratch directory by any other way is small, and is added as it is. A way that this module does not know costs time,
never content.

Guarantees:
- Only calls of this thread, with a path below the scratch directory and without unusual options, are taken over.
- The exchange ends with the block, whatever happens in it.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

from ...engine.engine import AsyncCheckpointEngine
from ...storage.staged import Destination
from ..frameworks import require

# Modules that hold safetensors' function under a name of their own.
_SAFETENSORS_USERS = (
    ("safetensors.torch", "save_file"),
    ("transformers.modeling_utils", "safe_save_file"),
    ("accelerate.utils.other", "safe_save_file"),
    ("peft.peft_model", "safe_save_file"),
)


class CapturedDestination(Destination):
    """A checkpoint whose content is captured."""

    # What Transformers and Accelerate load with weights_only=False, or with NumPy's types allowed.
    loads_itself = re.compile(
        r"training_args\.bin|rng_state(_\d+)?\.pth|random_states_\d+\.pkl|custom_checkpoint_\d+\.pkl"
    )


@contextlib.contextmanager
def capture(engine: AsyncCheckpointEngine, folder_name: str) -> Iterator[str]:
    """Give a scratch directory whose sub-directory `folder_name` becomes the content of the checkpoint opened last.

    Tensors are snapshotted while the block runs, everything else at its end. The caller creates and commits the tag.
    """
    with tempfile.TemporaryDirectory(prefix="async-ckpt-") as scratch:
        folder = os.path.join(os.path.realpath(scratch), folder_name)
        with _redirected(engine, folder):
            yield os.path.dirname(folder)
        for where, folders, files in os.walk(folder):
            folders.sort()
            for path in (os.path.join(where, name) for name in sorted(files)):
                with open(path, "rb") as file:
                    engine.save_bytes(file.read(), os.path.relpath(path, folder))


@contextlib.contextmanager
def _redirected(engine: AsyncCheckpointEngine, folder: str) -> Iterator[None]:
    import torch

    thread = threading.get_ident()

    def name_inside(target: Any) -> str | None:
        if threading.get_ident() != thread or not isinstance(target, (str, os.PathLike)):
            return None
        text = os.path.abspath(os.fspath(target))
        return text[len(folder) + 1 :] if isinstance(text, str) and text.startswith(folder + os.sep) else None

    stock_save = torch.save

    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        name = name_inside(f)
        if name is None or args or kwargs:
            stock_save(obj, f, *args, **kwargs)
        else:
            engine.save(obj, name, format="torch")

    with contextlib.ExitStack() as undo:
        _exchange(undo, torch, "save", save)
        stock_save_file = require("huggingface", "safetensors.torch").save_file

        def save_file(tensors: Any, filename: Any, metadata: Any = None) -> None:
            name = name_inside(filename)
            if name is None:
                stock_save_file(tensors, filename, metadata)
            else:
                header = {} if metadata is None else {"__metadata__": dict(metadata)}
                engine.save({**header, **tensors}, name, format="safetensors")

        for module, attribute in _SAFETENSORS_USERS:
            user = sys.modules.get(module)
            if getattr(user, attribute, None) is stock_save_file:
                _exchange(undo, user, attribute, save_file)
        yield


def _exchange(undo: contextlib.ExitStack, owner: Any, name: str, new: Any) -> None:
    undo.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, new)
