"""Committed checkpoints made by hand: `torch.save` bytes and a manifest, without the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from async_ckpt import Catalog
from async_ckpt.format import manifest
from async_ckpt.format.checksum import crc32
from async_ckpt.format.names import MANIFEST_NAME
from async_ckpt.storage.filesystem import FileSystem

EXTENT_BYTES = 64 << 10


def commit(
    root: Path, tag: str, files: dict[str, bytes], *, extent_bytes: int = EXTENT_BYTES, format: str = "torch"
) -> Any:
    """Write `files` and a manifest; returns a catalog of `root`."""
    entries = []
    for name, data in files.items():
        path = root / tag / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        crcs = tuple(crc32(data[i : i + extent_bytes]) for i in range(0, len(data), extent_bytes))
        entries.append(manifest.FileEntry(name, len(data), extent_bytes, crcs, format, "fast", None))
    raw = manifest.encode(manifest.Manifest(tag, 1, tuple(entries)))
    (root / tag / MANIFEST_NAME).write_bytes(raw)
    return catalog(root)


def catalog(root: Path, filesystem: Any = None) -> Catalog:
    return Catalog(root, filesystem or FileSystem())
