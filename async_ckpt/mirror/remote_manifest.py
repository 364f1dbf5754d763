"""The manifest in a store: read, put where the condition holds, and the deletion of what no manifest names any more. Blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..errors import CorruptCheckpointError, MirrorError
from ..manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, decode
from .plan import UploadPlan, attempt_of, object_key
from .store import ANY_VERSION, ConditionFailed, Store

_TRIES = 12
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 2.0


@dataclass(frozen=True)
class FoundManifest:
    """A manifest as it is in a store; damaged where `manifest` is None."""

    raw: bytes
    e_tag: str
    manifest: Manifest | None
    attempt: str

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
    info = store.head(key)
    if info is None:
        return None
    try:
        raw = bytes(store.get_range(key, 0, min(info.size_bytes, MAX_MANIFEST_BYTES)))
    except FileNotFoundError:
        return None
    try:
        manifest = decode(raw, source=source)
        if manifest.tag != tag:
            raise CorruptCheckpointError(f"{source} is the manifest of {manifest.tag!r}", path=source)
        return FoundManifest(raw, info.e_tag, manifest, attempt_of(raw, source=source))
    except CorruptCheckpointError:
        return FoundManifest(raw, info.e_tag, None, "")


def may_replace(found: FoundManifest, plan: UploadPlan, ours: Iterable[str], may_overwrite: bool) -> bool:
    """A damaged one; an older one that this root has put; any older one where overwriting was asked for."""
    if found.manifest is None:
        return True
    return (may_overwrite or found.attempt in set(ours)) and found.manifest.created_unix_ns < plan.created_unix_ns


def publish(store: Store, plan: UploadPlan, *, conditional: bool, may_replace: Callable[[FoundManifest], bool]) -> tuple[str, ...]:
    """Put the manifest and read it back; returns the objects that a replaced one named and nobody names now.

    A conflict (409), a reply that was lost and a manifest that arrived damaged are tried again.

    Raises:
        ConditionFailed: the store has a manifest that may not be replaced. MirrorError: the store failed.
    """
    replaced: set[str] = set()
    failure: MirrorError | None = None
    for attempt in range(_TRIES):
        found = read_manifest(store, plan.tag)
        if found is not None and found.raw == plan.manifest:
            return tuple(sorted(replaced - set(found.keys)))
        if found is not None:
            if not may_replace(found):
                raise _refusal(store, plan, found)
            replaced |= set(found.keys)
        try:
            absent_or_this = found.e_tag if found is not None else None
            store.put_if(plan.manifest_key, plan.manifest, absent_or_this if conditional else ANY_VERSION)
        except MirrorError as error:
            # The reply may have been lost after the store had done it, so the store is asked before anything is said.
            failure = error
            time.sleep(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))
    found = read_manifest(store, plan.tag)
    if found is not None and found.raw == plan.manifest:
        return tuple(sorted(replaced - set(found.keys)))
    raise failure or MirrorError(f"the store accepts the manifest of {plan.tag!r} but holds other bytes", url=store.url)


def _refusal(store: Store, plan: UploadPlan, found: FoundManifest) -> ConditionFailed:
    assert found.manifest is not None
    order = "a newer" if found.manifest.created_unix_ns >= plan.created_unix_ns else "an older"
    return ConditionFailed(
        f"the store has {order} checkpoint {plan.tag!r} of another run (attempt {found.attempt}), which stays. "
        "Give this run a prefix of its own, or overwrite='replace' to replace older ones",
        url=store.url,
    )
