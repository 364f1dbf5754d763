"""Deletes one checkpoint in a store: the manifest first, then exactly the objects that it named, never by prefix.
Blocks."""

from __future__ import annotations

from dataclasses import replace

from ..errors import CheckpointNotFoundError
from ..format.manifest import Manifest
from ..format.names import MANIFEST_NAME
from .remote_manifest import delete_doomed, read_manifest
from .state import States, TagState
from .store import Store


def remove_remote(store: Store, states: States | None, expected: Manifest) -> None:
    """Delete this very checkpoint. With `states`, what a crash leaves between the two deletions is deleted at the
    next start.

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
        states.write(replace(kept, doomed=(*kept.doomed, *found.keys)))
    store.delete([f"{expected.tag}/{MANIFEST_NAME}"])
    store.delete(found.keys)
    if states is not None and state is None:
        states.forget(expected.tag)
    elif states is not None:
        delete_doomed(store, states, expected.tag)
