"""Each rank's part of the manifest: a file in the staging directory, and a digest of it that goes over the store."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import CommitError
from ..format import manifest
from ..format.checksum import crc32
from ..format.manifest import FileEntry, Manifest
from ..storage.filesystem import FileSystem
from ..storage.staged import Staging, create_file


def write_part(fs: FileSystem, staging: Staging, rank: int, part: Manifest) -> str:
    """Leave this rank's file entries, durable, for the leader; returns their digest."""
    raw = manifest.encode(part)
    create_file(fs, staging, _part_name(rank), raw)
    fs.fsync_dir(staging.path)
    return _digest(raw)


def merge_parts(fs: FileSystem, location: str, ranks: Sequence[int], digests: Sequence[str]) -> list[FileEntry]:
    """All ranks' entries; their part files are removed. A rank's vote may follow its digest.

    Raises:
        CommitError: a part is not what its rank has reported, or two ranks saved the same path.
    """
    entries: dict[str, FileEntry] = {}
    for rank, digest in zip(ranks, digests, strict=True):
        path = os.path.join(location, _part_name(rank))
        raw = fs.read_file(path, manifest.MAX_MANIFEST_BYTES)
        if _digest(raw) != digest.partition(" ")[0]:
            raise CommitError(
                f"rank {rank}'s part in {path!r} is not what that rank has written", step="ranks", path=path
            )
        for entry in manifest.decode(raw, source=path).files:
            if entry.path in entries:
                raise CommitError(
                    f"ranks {entries[entry.path].rank} and {rank} both saved {entry.path!r}", step="ranks", path=path
                )
            entries[entry.path] = entry
        fs.unlink(path)
    return list(entries.values())


def _part_name(rank: int) -> str:
    # As no file in a checkpoint may be called.
    return f".part.{rank}.json"


def _digest(raw: bytes) -> str:
    return f"{len(raw)}:{crc32(raw):08x}"
