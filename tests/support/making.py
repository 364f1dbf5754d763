"""Committed checkpoints made with the disk side alone: no engine, no torch."""

from __future__ import annotations

import os
from pathlib import Path

from async_ckpt.format.checksum import crc32
from async_ckpt.format.manifest import FileEntry, Manifest
from async_ckpt.reading.catalog import Catalog
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from async_ckpt.storage.staged import Destination, Staging

EXTENT_BYTES = 4096

OLD = {"model.bin": b"old" * 3000, "sub/optim.bin": b"old too"}
NEW = {"model.bin": b"new!" * 3000, "other/deep/x.bin": b"", "extra.bin": b"n"}


def entry(path: str, data: bytes, extent_bytes: int = EXTENT_BYTES) -> FileEntry:
    crcs = tuple(crc32(data[at : at + extent_bytes]) for at in range(0, len(data), extent_bytes))
    return FileEntry(path, len(data), extent_bytes, crcs, "opaque", "test", None)


def begin(fs: FileSystem, root: str | Path, tag: str, overwrite: str = "refuse") -> Staging:
    return transaction.begin(fs, Staging(Destination(str(root), tag), overwrite))


def stage(fs: FileSystem, root: Path, tag: str, files: dict[str, bytes], overwrite: str = "refuse") -> Staging:
    staging = begin(fs, root, tag, overwrite)
    try:
        for path, data in files.items():
            folder = os.path.dirname(path)
            transaction.make_directories(fs, staging.path, [folder] if folder else [])
            fs.create_file(os.path.join(staging.path, path), data)
    except Exception:
        transaction.abort(fs, staging)
        raise
    return staging


def publish(fs: FileSystem, staging: Staging, files: dict[str, bytes], created: int = 1) -> None:
    entries = tuple(entry(path, data) for path, data in files.items())
    transaction.publish(fs, staging, Manifest(staging.tag, created, entries, {"step": created}))


def commit(
    root: Path,
    tag: str,
    files: dict[str, bytes] = OLD,
    *,
    fs: FileSystem | None = None,
    overwrite: str = "refuse",
    created: int = 1,
) -> None:
    """The whole way; gives up what is staged when a step fails."""
    fs = FileSystem() if fs is None else fs
    staging = stage(fs, root, tag, files, overwrite)
    try:
        publish(fs, staging, files, created)
    except Exception:
        transaction.abort(fs, staging)
        raise


def content(root: Path, tag: str) -> dict[str, bytes] | None:
    """The files of a listed tag, after full verification; None if it is not listed."""
    catalog = Catalog(root)
    if tag not in catalog.tags():
        return None
    report = catalog.verify(tag)
    assert report.ok, report.problems
    return {item.path: (root / tag / item.path).read_bytes() for item in catalog.manifest(tag).files}


def private_names(root: Path) -> list[str]:
    return sorted(name for name in os.listdir(root) if name.startswith("."))
