"""What a store can do, found out by trying, once per engine: does it keep conditions, is its entity tag an MD5?

Some servers take ``If-None-Match`` and ignore it; some refuse a second writer who comes later, but not two at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass

from ..errors import MirrorError
from .store import ConditionFailed, PassingFailure, Store

_NUM_RACERS = 4
_TRIES = 3


@dataclass(frozen=True)
class Abilities:
    """What can be relied on."""

    conditional: bool
    """Put-if-absent and put-if-match are kept, also among writers that race."""
    md5_tags: bool
    """The entity tag of an object that was put in one piece is its MD5."""


def probe(store: Store, executor: Executor) -> Abilities:
    """Put, race for, replace and delete a few bytes under a name that no tag has. Blocks.

    Raises:
        MirrorError: the store cannot be reached, or refuses; says what to do.
    """
    for attempt in range(1, _TRIES + 1):
        try:
            abilities = _probe(store, executor)
        except PassingFailure:
            # What came of the request is not known, so neither is who has won: once more, with another name.
            if attempt == _TRIES:
                raise
        else:
            if abilities is not None:
                return abilities
    return Abilities(False, False)


def _probe(store: Store, executor: Executor) -> Abilities | None:
    """None where nobody seems to have won, because a reply was lost."""
    key = f".probe-{secrets.token_hex(8)}"
    texts = [f"racer {k}".encode() for k in range(_NUM_RACERS)]
    races = [executor.submit(_wins, store, key, text, None) for text in texts]
    wait(races)
    try:
        return _judged(store, key, races)
    finally:
        with contextlib.suppress(MirrorError):
            store.delete([key])


def _judged(store: Store, key: str, races: list[Future[bool]]) -> Abilities | None:
    num_winners = sum(race.result() for race in races)
    found = store.head(key)
    if found is None or not num_winners:
        return None
    is_kept = (
        num_winners == 1
        and not _wins(store, key, b"late", None)
        and not _wins(store, key, b"stranger", '"0123456789abcdef"')
    )
    content = bytes(store.get_range(key, 0, found.size_bytes))
    is_md5 = found.e_tag.strip('"') == hashlib.md5(content, usedforsecurity=False).hexdigest()
    return Abilities(is_kept, is_md5)


def _wins(store: Store, key: str, data: bytes, e_tag: str | None) -> bool:
    try:
        store.put_if(key, data, e_tag)
    except ConditionFailed:
        return False
    return True
