"""Each rank's part of the manifest: a file in the staging directory, and a digest of it that goes over the store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import CommitError, RankFailedError, some_of
from ..format import manifest
from ..format.checksum import crc32
from ..format.manifest import FileEntry, Manifest
from ..storage.filesystem import FileSystem
from ..storage.staged import Staging, create_file

_SHARED = "shared"
"""In the metadata of a part: what its rank tells of shared files, by path."""


def write_part(fs: FileSystem, staging: Staging, rank: int, part: Manifest) -> str:
    """Leave this rank's file entries, and what it tells of shared files, durable, for the leader; returns their
    digest.
    """
    shared = {path: file.tell() for path, file in staging.shared.items()}
    raw = manifest.encode(replace(part, metadata={_SHARED: shared} if shared else {}))
    create_file(fs, staging, _part_name(rank), raw)
    fs.fsync_dir(staging.path)
    return _digest(raw)


def merge_parts(
    fs: FileSystem, staging: Staging, ranks: Sequence[int], digests: Sequence[str]
) -> tuple[FileEntry, ...]:
    """All ranks' entries, and those of shared files, which are made whole; the ranks' part files are removed. A rank's
    vote may follow its digest. Raises CommitError: a part is not what its rank reported, or two ranks saved one path.
    RankFailedError: the ranks do not agree on a shared file.
    """
    entries: dict[str, FileEntry] = {}
    shared: dict[str, dict[int, dict[str, Any]]] = {path: {} for path in staging.shared}
    location = staging.path
    for rank, digest in zip(ranks, digests, strict=True):
        path = os.path.join(location, _part_name(rank))
        raw = fs.read_file(path, manifest.MAX_MANIFEST_BYTES)
        if _digest(raw) != digest.partition(" ")[0]:
            told = f"rank {rank}'s part in {path!r} is not what that rank has written"
            raise CommitError(told, step="ranks", path=path)
        part = manifest.decode(raw, source=path)
        for name, told in part.metadata.get(_SHARED, {}).items():
            shared.setdefault(name, {})[rank] = told
        for entry in part.files:
            if entry.path in entries:
                told = f"ranks {entries[entry.path].rank} and {rank} both saved {entry.path!r}"
                raise CommitError(told, step="ranks", path=path)
            entries[entry.path] = entry
        fs.unlink(path)
    for name, tellers in shared.items():
        missing = [rank for rank in ranks if rank not in tellers]
        if missing:
            told = some_of(list(map(str, missing)), 8)
            raise RankFailedError(f"{name!r} was saved with replicated=True, but not by rank {told}", rank=missing[0])
    return *entries.values(), *(file.finish(fs, location, shared[name]) for name, file in staging.shared.items())


def _part_name(rank: int) -> str:
    # As no file in a checkpoint may be called.
    return f".part.{rank}.json"


def _digest(raw: bytes) -> str:
    return f"{len(raw)}:{crc32(raw):08x}"
