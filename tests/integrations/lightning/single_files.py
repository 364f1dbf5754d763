"""Single-file checkpoints, committed without Lightning."""

from __future__ import annotations

from pathlib import Path

import torch

from async_ckpt.format.checksum import crc32
from async_ckpt.format.manifest import FileEntry, Manifest
from async_ckpt.integrations.lightning.single_file import DATA_NAME, CheckpointFile, FileCoordinator
from async_ckpt.storage.filesystem import FileSystem
from tests.support.comparing import torch_bytes


def commit(fs: FileSystem, place: CheckpointFile, step: int) -> None:
    """What engine and writer do with a checkpoint, in one thread."""
    data = torch_bytes({"step": step, "w": torch.full((100,), float(step))})
    coordinator = FileCoordinator()
    coordinator.bind(fs, place.root)
    coordinator.sweep()
    opened = coordinator.begin(place, "replace")
    entry = FileEntry(DATA_NAME, len(data), len(data), (crc32(data),), "torch", "torch", None)
    try:
        fs.create_file(f"{opened.location.result()}/{DATA_NAME}", data)
        coordinator.publish(opened, Manifest(opened.tag, step, (entry,), {"file": place.name}))
    except Exception as error:
        coordinator.abort(opened, error)
        raise


def commit_file(path: Path, step: int) -> None:
    """A checkpoint at `path`."""
    commit(FileSystem(), CheckpointFile(str(path)), step)
