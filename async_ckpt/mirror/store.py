"""The seam to a store: a few methods, so that another library or service can be brought; and what a store can do.

Keys are below the mirror's prefix. Every method may be called from any thread, and blocks. They raise
`FileNotFoundError` for an object that is not there, and `MirrorError` for everything else.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import MirrorError
from ..threads.executor import run_on_threads

PROBE_TIMEOUT_S = 10.0
_NUM_RACERS, _NUM_BYTES = 4, 8
_TRIES = 3


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object; `e_tag` changes with its content, `version` (where a store has one) with each
    put."""

    size_bytes: int
    e_tag: str
    version: str | None = None


ANY_VERSION = ObjectInfo(-1, "*")
"""For `Store.put_if`: whatever is there, or nothing."""
_STRANGER = ObjectInfo(0, '"0123456789abcdef"', "1")


class ConditionFailed(MirrorError):
    """The object is there already, or is no longer the one that was to be replaced. Nothing was changed."""


class PassingFailure(MirrorError):
    """A failure that may pass: a connection that broke, a server that is overloaded or restarting. It may have been
    done all the same."""


class AbortedElsewhere(PassingFailure):
    """Another process, which uploads the same checkpoint, has removed the parts of this upload."""


class Store(Protocol):
    """One mirror's place in a store. See the module docstring for threads and errors."""

    url: str

    def put(self, key: str, parts: Iterator[memoryview], *, size_bytes: int, part_bytes: int, parallel: int) -> None:
        """Make or replace an object of `parts`, atomically; all but the last have `part_bytes` bytes. Each is let go
        once it is sent."""

    def put_if(self, key: str, data: bytes, replaced: ObjectInfo | None) -> None:
        """Put a small object only where there is none (`replaced` None), in place of exactly that one, or always
        (`ANY_VERSION`). Raises ConditionFailed: the condition does not hold (in a store that knows conditions)."""

    def read(self, key: str, max_bytes: int) -> tuple[ObjectInfo, bytes] | None:
        """A small object; without its bytes where it has more than `max_bytes`. None where there is none."""

    def get_range(self, key: str, offset: int, num_bytes: int) -> memoryview:
        """Bytes of an object; fewer where it ends before."""

    def head(self, key: str) -> ObjectInfo | None:
        """What is there; None where nothing is."""

    def list(self, folder: str) -> tuple[Sequence[str], Sequence[str]]:
        """Names of the folders and of the objects that are directly in `folder`; none where there is no such folder."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there do not matter."""

    def discard_parts(self, key: str) -> None:
        """Remove what interrupted calls of `put` left of this object."""

    def refuses_damage(self, key: str) -> bool:
        """Whether the store compares what arrives with its checksum: found out by a few wrong bytes under `key`."""


@dataclass(frozen=True)
class Abilities:
    """What can be relied on."""

    conditional: bool
    """Put-if-absent and put-if-match are kept, also among writers that race."""
    compares_md5: bool
    """The store does not compare what arrives with its checksum, but tells its MD5: then we compare that."""


def probe(store: Store) -> Abilities:
    """Find out what a store can do: put, race for, replace and delete a few bytes under a name that no tag has. Some
    servers take ``If-None-Match`` and ignore it; some refuse a second writer who comes later, but not two at once.

    Blocks. Raises MirrorError: the store cannot be reached, or refuses; says what to do."""
    for attempt in range(1, _TRIES + 1):
        key = f".probe-{secrets.token_hex(8)}"
        try:
            abilities = _probe(store, key)
        except PassingFailure:
            # What came of the request is not known, so neither is who has won: once more, with another name.
            if attempt == _TRIES:
                raise
        else:
            if abilities is not None:
                return abilities
        finally:
            with contextlib.suppress(MirrorError):
                store.delete([key])
    return Abilities(False, False)


def _probe(store: Store, key: str) -> Abilities | None:
    """None where nobody seems to have won, because a reply was lost."""
    wins: list[bool] = []

    def race() -> None:
        wins.append(_wins(store, key, secrets.token_bytes(_NUM_BYTES), None))

    run_on_threads("async-ckpt-mirror", _NUM_RACERS, race, stop=lambda: None)
    found = store.read(key, _NUM_BYTES)
    if found is None or not any(wins):
        return None
    is_kept = sum(wins) == 1 and not _wins(store, key, b"late", None) and not _wins(store, key, b"odd", _STRANGER)
    info, content = found
    is_md5 = info.e_tag.strip('"') == hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Abilities(is_kept, is_md5 and not store.refuses_damage(key))


def _wins(store: Store, key: str, data: bytes, replaced: ObjectInfo | None) -> bool:
    try:
        store.put_if(key, data, replaced)
    except ConditionFailed:
        return False
    return True
