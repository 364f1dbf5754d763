"""Which objects a checkpoint becomes in a store, as plain data. No I/O.

    <prefix>/<tag>/<attempt>/<path>     one object per file, byte for byte the file
    <prefix>/<tag>/manifest.json        the manifest of the disk, with one more member: "attempt"

The attempt is the first 16 hex digits of the SHA-256 of the manifest on disk: two commits under one tag never share
an object.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import MirrorError
from ..format.checksum import crc32
from ..format.manifest import FileEntry, Manifest
from ..format.names import MANIFEST_NAME
from .config import MAX_PARTS

_TAIL = re.compile(rb',"crc32":"[0-9a-f]{8}"\}\n\Z')


@dataclass(frozen=True)
class ObjectPlan:
    """One object: a file of the checkpoint, and the key it gets."""

    key: str
    entry: FileEntry

    def parts(self, part_bytes: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of each part, in order; one empty part for an empty file."""
        for offset in range(0, max(1, self.entry.size_bytes), part_bytes):
            yield offset, min(part_bytes, self.entry.size_bytes - offset)


@dataclass(frozen=True)
class UploadPlan:
    """One checkpoint's objects. `objects` are those that this rank puts, `manifest` the bytes of the last object of
    all."""

    tag: str
    attempt: str
    created_unix_ns: int
    objects: tuple[ObjectPlan, ...]
    manifest: bytes

    @property
    def manifest_key(self) -> str:
        """The key of the manifest."""
        return f"{self.tag}/{MANIFEST_NAME}"


def plan_upload(manifest: Manifest, raw: bytes, *, rank: int | None, part_bytes: int, url: str) -> UploadPlan:
    """The plan for a checkpoint whose manifest on disk is `raw`; with a `rank`, only of the files that it wrote.

    Raises:
        MirrorError: a file would have more parts than stores take; nothing was sent.
    """
    # What was copied out of a mirror has one already.
    attempt = manifest.attempt or hashlib.sha256(raw).hexdigest()[:16]
    for entry in manifest.files:
        if entry.size_bytes > MAX_PARTS * part_bytes:
            needed = -(-entry.size_bytes // MAX_PARTS)
            raise MirrorError(
                f"{manifest.tag}/{entry.path} has {entry.size_bytes} bytes, more than {MAX_PARTS} parts of "
                f"{part_bytes}: set the mirror's part_bytes to {needed} or more. Nothing was sent",
                url=url,
            )
    mine = [entry for entry in manifest.files if rank is None or (entry.rank or 0) == rank]
    objects = tuple(ObjectPlan(object_key(manifest.tag, attempt, entry.path), entry) for entry in mine)
    with_one = raw if manifest.attempt else with_attempt(raw, attempt)
    return UploadPlan(manifest.tag, attempt, manifest.created_unix_ns, objects, with_one)


def object_key(tag: str, attempt: str, path: str) -> str:
    """The key of a file, below the mirror's prefix; without an attempt, of one that was put there by other means."""
    return f"{tag}/{attempt}/{path}" if attempt else f"{tag}/{path}"


def with_attempt(raw: bytes, attempt: str) -> bytes:
    """The manifest `raw` with the member "attempt", and its checksum made anew."""
    body = raw[: -len(',"crc32":"00000000"}\n')] + f',"attempt":"{attempt}"'.encode("ascii")
    return body + f',"crc32":"{crc32(body):08x}"}}\n'.encode("ascii")


def combined_md5(part_md5: list[bytes]) -> str:
    """The entity tag that S3 gives an object of several parts; without quotes."""
    return hashlib.md5(b"".join(part_md5), usedforsecurity=False).hexdigest() + f"-{len(part_md5)}"
