"""Deletes older checkpoints in a store: the manifest first, then exactly the objects that it named, never by prefix. Blocks."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from ..errors import CheckpointNotFoundError
from ..format.manifest import Manifest
from ..format.names import MANIFEST_NAME
from ..reading.catalog import Catalog
from ..retention import CheckpointInfo, Decision, RetentionPolicy, committed_here, decide
from .remote_manifest import delete_doomed, read_manifest
from .state import States, TagState
from .store import Store


def apply_remote(
    store: Store, catalog: Catalog, states: States | None, policy: RetentionPolicy, *, protected: Collection[str] = ()
) -> list[Decision]:
    """Delete what the policy does not keep, oldest first; returns what was done.

    Never the newest one, nothing at all while that is not whole in the store, and never a tag in `protected` (what the
    run resumed from). What a crash leaves between the two deletions is in the state, and deleted at the next start.

    Raises:
        ConfigError: the policy cannot judge these checkpoints. MirrorError: the store failed; what was not deleted is whole.
    """
    manifests = {manifest.tag: manifest for manifest in committed_here(catalog)}
    decisions = decide([CheckpointInfo.of(manifest) for manifest in manifests.values()], policy)
    doomed = [decision for decision in decisions if not decision.keep]
    if doomed and not _is_whole(catalog, decisions[-1].tag):
        reason = (f"the newest checkpoint {decisions[-1].tag!r} is not whole in the store; nothing is deleted before it is",)
        return [decision if decision.keep else Decision(decision.tag, True, reason) for decision in decisions]
    done: list[Decision] = []
    for decision in decisions:
        if not decision.keep and decision.tag in protected:
            decision = Decision(decision.tag, True, ("the run resumed from it",))
        if not decision.keep and not remove_remote(store, states, manifests[decision.tag]):
            decision = Decision(decision.tag, True, ("another process replaced or deleted it meanwhile",))
        done.append(decision)
    return done


def remove_remote(store: Store, states: States | None, expected: Manifest) -> bool:
    """Delete one checkpoint, if it is still this one; False where it is not."""
    found = read_manifest(store, expected.tag)
    if found is None or found.manifest != expected:
        return False
    state = states.get(expected.tag) if states is not None else None
    if states is not None:
        # An own upload of the same tag in progress keeps its state: only the objects to be deleted are added.
        kept = state or TagState(expected.tag, found.attempt, expected.created_unix_ns, mirrored=True)
        states.write(replace(kept, doomed=(*kept.doomed, *found.keys)))
    store.delete([f"{expected.tag}/{MANIFEST_NAME}"])
    store.delete(found.keys)
    if states is not None and state is None:
        states.forget(expected.tag)
    elif states is not None:
        delete_doomed(store, states, expected.tag)
    return True


def _is_whole(catalog: Catalog, tag: str) -> bool:
    try:
        return catalog.verify(tag, level="size").ok
    except CheckpointNotFoundError:
        return False
