"""A checkpoint in a store: which objects it becomes, and the manifest that names them.

    <prefix>/<tag>/<attempt>/<path>     one object per file, byte for byte the file
    <prefix>/<tag>/manifest.json        the manifest of the disk, with one more member: "attempt"

The attempt is the first 16 hex digits of the SHA-256 of the manifest on disk: two commits under one tag never share
an object. The manifest is deleted before what it names. What takes a `Store` blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..errors import CheckpointNotFoundError, CorruptCheckpointError, MirrorError
from ..format.checksum import crc32
from ..format.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest, decode
from ..format.names import MANIFEST_NAME
from .config import MAX_PARTS, Mirror
from .state import States, TagState
from .store import ObjectInfo, Store


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


def plan_upload(manifest: Manifest, raw: bytes, mirror: Mirror, rank: int | None) -> UploadPlan:
    """The plan for a checkpoint whose manifest on disk is `raw`; with a `rank`, only of the files that it wrote. Raises
    MirrorError: a file would have more parts than stores take; nothing was sent."""
    # What was copied out of a mirror has one already.
    attempt = manifest.attempt or hashlib.sha256(raw).hexdigest()[:16]
    for entry in manifest.files:
        if entry.size_bytes > MAX_PARTS * mirror.part_bytes:
            raise MirrorError(
                f"{manifest.tag}/{entry.path} has {entry.size_bytes} bytes, more than {MAX_PARTS} parts of "
                f"{mirror.part_bytes}: set the mirror's part_bytes to {-(-entry.size_bytes // MAX_PARTS)} or more. "
                "Nothing was sent",
                url=mirror.url,
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


@dataclass(frozen=True)
class FoundManifest:
    """A manifest as it is in a store; damaged where `manifest` is None."""

    raw: bytes
    info: ObjectInfo
    manifest: Manifest | None

    @property
    def attempt(self) -> str:
        """The attempt that it names; empty where it is damaged."""
        return "" if self.manifest is None else self.manifest.attempt

    @property
    def keys(self) -> tuple[str, ...]:
        """The objects that it names."""
        if self.manifest is None:
            return ()
        return tuple(object_key(self.manifest.tag, self.attempt, entry.path) for entry in self.manifest.files)


def read_manifest(store: Store, tag: str) -> FoundManifest | None:
    """What the store has under a tag; None where there is no manifest. Raises MirrorError: the store failed."""
    key = f"{tag}/{MANIFEST_NAME}"
    source = f"{store.url}/{key}"
    there = store.read(key, MAX_MANIFEST_BYTES)
    if there is None:
        return None
    info, raw = there
    try:
        manifest = decode(raw, source=source)
        if manifest.tag != tag:
            raise CorruptCheckpointError(f"{source} is the manifest of {manifest.tag!r}", path=source)
        return FoundManifest(raw, info, manifest)
    except CorruptCheckpointError:
        return FoundManifest(raw, info, None)


def delete_doomed(store: Store, states: States, tag: str) -> None:
    """Delete what the state of `tag` says is to be deleted, except what the manifest in the store (still) names. Raises
    MirrorError: the store failed; it is tried again at the next start."""
    state = states.get(tag)
    if state is not None and state.doomed:
        found = read_manifest(store, tag)
        named = found.keys if found is not None else ()
        store.delete([key for key in state.doomed if key not in named])
        # Not published yet: then what is to be replaced is still named.
        states.write(
            replace(state, doomed=() if state.mirrored else tuple(key for key in state.doomed if key in named))
        )


def remove_remote(store: Store, states: States | None, expected: Manifest) -> None:
    """Delete this very checkpoint: the manifest first, then exactly the objects that it named, never by prefix. With
    `states`, what a crash leaves between the two deletions is deleted at the next start. Raises
    CheckpointNotFoundError: it is gone, or another one has its tag; nothing was deleted. MirrorError: the store
    failed."""
    found = read_manifest(store, expected.tag)
    if found is None or found.manifest != expected:
        raise CheckpointNotFoundError(
            f"{store.url} has no such checkpoint {expected.tag!r} any more; nothing was deleted"
        )
    state = states.get(expected.tag) if states is not None else None
    if states is not None:
        # An own upload of the same tag in progress keeps its state: only the objects to be deleted are added.
        kept = state or TagState(expected.tag, found.attempt, expected.created_unix_ns, mirrored=True)
        keys = () if kept.attempt == found.attempt else kept.keys
        states.write(replace(kept, keys=keys, doomed=(*kept.doomed, *found.keys)))
    store.delete([f"{expected.tag}/{MANIFEST_NAME}"])
    if states is None:
        store.delete(found.keys)
        return
    delete_doomed(store, states, expected.tag)
    if state is None:
        states.forget(expected.tag)
