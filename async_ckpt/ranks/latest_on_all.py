"""Which checkpoint to resume from, when each node has a root of its own: the newest one that every node has, whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import CheckpointError, CorruptCheckpointError, RankFailedError
from ..reading.catalog import Catalog
from ..threads.pending import name_pending
from .exchange import Exchange
from .rank_requests import RankInfo


def latest_on_all(info: RankInfo, catalog: Catalog, exchange: Exchange, verify: str) -> str | None:
    """The newest checkpoint that all nodes have and that verifies on all; None if there is none. Blocks.

    A node's leader reads and checks; the other ranks only wait. Two nodes' directories are one checkpoint only if they
    were committed together (same tag, same time of commit).

    Raises:
        RankFailedError: a rank does not answer, or could not read its root; on all ranks.
    """

    def leaders(work: Callable[[], Any]) -> Any:
        """What this node has to say; its own failure is said too, and raised on all ranks."""
        if not info.leads:
            return None
        try:
            return {"found": work()}
        except (CheckpointError, OSError) as error:
            return {"error": f"node {info.node} could not read its checkpoints: {type(error).__name__}: {error}"[:600]}

    def problem_with(tag: str) -> str:
        try:
            report = catalog.verify(tag, level=verify)
        except CorruptCheckpointError as error:
            return str(error)
        return "" if report.ok else str(report.problems[0])

    exchange.begin()
    committed = exchange.round(leaders(partial(_committed, catalog)), _on_all_nodes)
    for tag in committed:
        if not exchange.round(leaders(partial(problem_with, tag)), lambda said: any(_found(said))):
            return str(tag)
    return None


def _committed(catalog: Catalog) -> list[tuple[str, int]]:
    name_pending(catalog.root)
    return [(entry.tag, entry.manifest.created_unix_ns) for entry in catalog.entries() if entry.manifest is not None]


def _on_all_nodes(said: list[Any]) -> list[str]:
    """Tags, newest first."""
    everywhere = set.intersection(*({(tag, created) for tag, created in found} for found in _found(said)))
    return [tag for tag, _ in sorted(everywhere, key=lambda pair: (pair[1], pair[0]), reverse=True)]


def _found(said: list[Any]) -> list[Any]:
    """What the leaders have found.

    Raises:
        RankFailedError: one of them could not read.
    """
    for rank, word in enumerate(said):
        if word is not None and "error" in word:
            raise RankFailedError(word["error"], rank=rank)
    return [word["found"] for word in said if word is not None]
