"""The manifest in a store: read, and deleted before what it names. Blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import CheckpointNotFoundError, CorruptCheckpointError
from ..format.manifest import MAX_MANIFEST_BYTES, Manifest, decode
from ..format.names import MANIFEST_NAME
from .plan import object_key
from .state import States, TagState
from .store import ObjectInfo, Store


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
    """What the store has under a tag; None where there is no manifest.

    Raises:
        MirrorError: the store failed.
    """
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
    """Delete what the state of `tag` says is to be deleted, except what the manifest in the store (still) names.

    Raises:
        MirrorError: the store failed; it is tried again at the next start.
    """
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
    `states`, what a crash leaves between the two deletions is deleted at the next start.

    Raises:
        CheckpointNotFoundError: it is gone, or another one has its tag; nothing was deleted. MirrorError: the store
            failed.
    """
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
