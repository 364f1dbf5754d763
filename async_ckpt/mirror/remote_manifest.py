"""The manifest in a store: read, put where the condition holds, deleted before what it names. Blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ..errors import CheckpointNotFoundError, CorruptCheckpointError, MirrorError
from ..format.manifest import MAX_MANIFEST_BYTES, Manifest, decode
from ..format.names import MANIFEST_NAME
from .plan import UploadPlan, object_key
from .state import States, TagState
from .store import ANY_VERSION, ConditionFailed, ObjectInfo, PassingFailure, Store

_PAUSE_S, _MAX_PAUSE_S = 0.05, 5.0


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


def may_replace(found: FoundManifest, plan: UploadPlan, ours: Iterable[str], may_overwrite: bool) -> bool:
    """A damaged one; an older one that this root has put; any older one where overwriting was asked for."""
    if found.manifest is None:
        return True
    return (may_overwrite or found.attempt in set(ours)) and found.manifest.created_unix_ns < plan.created_unix_ns


def publish(
    store: Store,
    plan: UploadPlan,
    *,
    conditional: bool,
    may_replace: Callable[[FoundManifest], bool],
    on_replace: Callable[[FoundManifest], object],
    patience_s: float,
    pause: Callable[[float], object],
) -> None:
    """Put the manifest and read it back. `on_replace` is called before one is replaced: its objects are to be deleted
    afterwards.

    A conflict (409), a reply that was lost and a manifest that arrived damaged are tried again, for `patience_s`.

    Raises:
        ConditionFailed: the store has a manifest that may not be replaced. MirrorError: the store failed.
    """
    failure = MirrorError(f"the store accepts the manifest of {plan.tag!r} but holds other bytes", url=store.url)
    give_up_s, pause_s = time.monotonic() + patience_s, _PAUSE_S
    while True:
        found = read_manifest(store, plan.tag)
        if found is not None and found.raw == plan.manifest:
            return
        if found is not None and not may_replace(found):
            raise _refusal(store, plan, found)
        if time.monotonic() > give_up_s:
            raise failure
        if found is not None:
            on_replace(found)
        absent_or_this = found.info if found is not None else None
        try:
            store.put_if(plan.manifest_key, plan.manifest, absent_or_this if conditional else ANY_VERSION)
        except (ConditionFailed, PassingFailure) as error:
            # It may have been done all the same, or the other side be about to end: the store is asked before
            # anything is said.
            failure = error
            pause(pause_s)
            pause_s = min(_MAX_PAUSE_S, 2 * pause_s)


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


def _refusal(store: Store, plan: UploadPlan, found: FoundManifest) -> ConditionFailed:
    assert found.manifest is not None
    order = "a newer" if found.manifest.created_unix_ns >= plan.created_unix_ns else "an older"
    return ConditionFailed(
        f"the store has {order} checkpoint {plan.tag!r} of another run (attempt {found.attempt}), which stays. "
        "Give this run a prefix of its own, or overwrite='replace' to replace older ones",
        url=store.url,
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
