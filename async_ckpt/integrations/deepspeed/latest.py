"""DeepSpeed's `latest` file, and exports beside the checkpoints: each is whole, old or new, at any moment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import torch

from ...errors import CommitError, WriteError
from ...retention import CheckpointInfo, RetentionPolicy
from ...storage.filesystem import FileSystem
from ...storage.private_dirs import replacing

LATEST_NAME = "latest"
_MAX_LATEST_BYTES = 4096


def write_latest(filesystem: FileSystem, save_dir: str, tag: str) -> None:
    """Make `<save_dir>/latest` name `tag`: written beside it, synced, renamed, directory synced. Blocks; any thread.
    Raises CommitError: the checkpoint is committed, but `latest` still names the one before (or, after the rename, it
    is unknown which one survives power loss)."""
    path = os.path.join(save_dir, LATEST_NAME)
    new = os.path.join(save_dir, f".{LATEST_NAME}.new")
    try:
        with contextlib.suppress(FileNotFoundError):
            filesystem.unlink(new)
        with replacing(filesystem, path, new):
            filesystem.create_file(new, tag.encode())
    except OSError as error:
        raise CommitError(
            f"checkpoint {tag!r} is committed and whole in {save_dir!r}, but {path!r} could not be made to name "
            f"it: {error}",
            step="latest",
            errno=error.errno,
            path=path,
            committed=None,
        ) from error


class KeepLatest(RetentionPolicy):
    """Keeps what `latest` names, which is not the newest after saves with ``save_latest=False``."""

    def __init__(self, filesystem: FileSystem, save_dir: str) -> None:
        self._filesystem = filesystem
        self._path = os.path.join(save_dir, LATEST_NAME)

    def kept(self, checkpoints: Sequence[CheckpointInfo], now_unix_ns: int) -> dict[str, str]:
        try:
            named = self._filesystem.read_file(self._path, _MAX_LATEST_BYTES).decode().strip()
        except FileNotFoundError:
            return {}
        return {info.tag: "named by latest" for info in checkpoints if info.tag == named}


def write_beside(filesystem: FileSystem, path: str, state: Any) -> None:
    """`torch.save` to a path that belongs to no checkpoint: durable when it returns, never partly visible. Blocks.
    Raises WriteError: what was at `path` before is still there."""
    folder, name = os.path.split(os.path.abspath(path))
    new = os.path.join(folder, f".{name}.{os.getpid()}.new")
    try:
        with replacing(filesystem, os.path.join(folder, name), new), open(new, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise WriteError(
            f"saving {name!r} failed; what was there before is unchanged", errno=error.errno, path=path
        ) from error
