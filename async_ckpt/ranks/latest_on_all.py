"""Which checkpoint to resume from, when each node has a root of its own: the newest one that every node has, whole."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, RankFailedError, report
from ..reading.catalog import Catalog
from ..threads.outcome import name_pending
from .exchange import Exchange
from .rank_requests import RankInfo


def latest_on_all(
    info: RankInfo, tiers: Sequence[Catalog], exchange: Exchange, verify: str
) -> tuple[str | None, Catalog | None]:
    """As `RankCoordinator.latest_on_all`; and on a leader, which of `tiers` (its disk, then its mirrors) has it whole.
    Two nodes' directories are one checkpoint only if they were committed together (same tag, same time of commit).
    """
    where: Catalog | None = None

    def leaders(work: Callable[[], Any]) -> Any:
        """What this node has to say; its own failure is said too, and raised on all ranks."""
        if not info.leads:
            return None
        try:
            return {"found": work()}
        except (CheckpointError, OSError) as error:
            return {"error": f"node {info.node} could not read its checkpoints: {type(error).__name__}: {error}"[:600]}

    def problem_with(tag: str, created_unix_ns: int) -> str:
        nonlocal where
        problem = "it is gone"
        for where in tiers:
            try:
                if where.manifest(tag).created_unix_ns == created_unix_ns:
                    checked = where.verify(tag, level=verify)
                    if checked.ok:
                        return ""
                    problem = str(checked.problems[0])
            except (CorruptCheckpointError, CheckpointNotFoundError) as error:
                problem = str(error)
        return problem

    exchange.begin()
    for tag, created_unix_ns in exchange.round(
        leaders(partial(committed, tiers)), lambda said: newest_first(_found(said))
    ):
        mine = leaders(partial(problem_with, tag, created_unix_ns))
        if not exchange.round(mine, lambda said: any(_found(said))):
            return str(tag), where
    return None, None


def committed(tiers: Sequence[Catalog]) -> list[tuple[str, int]]:
    """What one of them has, by tag and time of commit. A mirror that cannot be reached is left out, unless it is all
    there is.
    """
    name_pending(tiers[0].root)
    found: set[tuple[str, int]] = set()
    for tier in tiers:
        try:
            entries = tier.entries()
        except CheckpointError as error:
            if tier is tiers[0] or not found:
                raise
            report(logging.WARNING, "latest: %s is left out: %s", tier.root, error)
            continue
        found |= {(entry.tag, entry.manifest.created_unix_ns) for entry in entries if entry.manifest is not None}
    return sorted(found)


def newest_first(committed: Sequence[Any]) -> list[tuple[str, int]]:
    """What all of these lists of `committed` have."""
    everywhere = set.intersection(*({(tag, created) for tag, created in one} for one in committed))
    return sorted(everywhere, key=lambda pair: (pair[1], pair[0]), reverse=True)


def _found(said: list[Any]) -> list[Any]:
    """What the leaders have found. Raises RankFailedError: one of them could not read."""
    for rank, word in enumerate(said):
        if word is not None and "error" in word:
            raise RankFailedError(word["error"], rank=rank)
    return [word["found"] for word in said if word is not None]
