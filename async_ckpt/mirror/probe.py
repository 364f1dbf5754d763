"""What a store can do, found out by trying, once per engine: does it keep conditions, does it compare checksums?

Some servers take ``If-None-Match`` and ignore it; some refuse a second writer who comes later, but not two at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from dataclasses import dataclass

from ..errors import MirrorError
from ..threads.executor import run_on_threads
from .store import ConditionFailed, ObjectInfo, PassingFailure, Store

_NUM_RACERS, _NUM_BYTES = 4, 8
_TRIES = 3
_STRANGER = ObjectInfo(0, '"0123456789abcdef"', "1")


@dataclass(frozen=True)
class Abilities:
    """What can be relied on."""

    conditional: bool
    """Put-if-absent and put-if-match are kept, also among writers that race."""
    compares_md5: bool
    """The store does not compare what arrives with its checksum, but tells its MD5: then we compare that."""


def probe(store: Store) -> Abilities:
    """Put, race for, replace and delete a few bytes under a name that no tag has. Blocks.

    Raises:
        MirrorError: the store cannot be reached, or refuses; says what to do.
    """
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
