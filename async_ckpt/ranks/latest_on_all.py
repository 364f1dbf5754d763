"""Which checkpoint to resume from, when each node has a root of its own: the newest one that every node has, whole.

Keys, below the run's prefix; n counts the questions: "latest/n/tags/g": what node g has; "latest/n/say/k": rank 0's
k-th word, a tag to check or the answer; "latest/n/said/k/g": what node g has found; "latest/n/seen": how many ranks
know the answer.

Guarantees:
- All ranks get the same answer, or all raise. A node's leader reads and checks; the other ranks only wait.
- Two nodes' directories are one checkpoint only if they were committed together (same tag, same time of commit).
- Constant number of requests per rank and candidate; rank 0 has one more per node. Every wait is bounded by
  `timeout_s`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

from ..errors import CheckpointError, CorruptCheckpointError, RankFailedError
from ..reading.catalog import Catalog
from .rank_requests import Add, Await, AwaitCount, Drop, Put, RankInfo, Step, one

Ask = Callable[[Step], Any]


class LatestOnAll:
    """One question to all ranks. `ask` runs a protocol step and returns its result; blocks."""

    def __init__(self, info: RankInfo, number: int, catalog: Catalog, ask: Ask) -> None:
        self._info = info
        self._prefix = f"latest/{number}"
        self._catalog = catalog
        self._ask = ask
        self.num_said = 0

    def newest(self, verify: str) -> str | None:
        """The newest checkpoint that all nodes have and that verifies on all; None if there is none.

        Raises:
            RankFailedError: a node does not answer, or could not read its root.
        """
        if self._info.leads:
            self._put(f"tags/{self._info.node}", self._look(self._list))
        return self._lead(verify) if self._info.rank == 0 else self._follow(verify)

    def _list(self) -> list[tuple[str, int]]:
        return [
            (entry.tag, entry.manifest.created_unix_ns)
            for entry in self._catalog.entries()
            if entry.manifest is not None
        ]

    def _check(self, tag: str, verify: str) -> str:
        try:
            report = self._catalog.verify(tag, level=verify)
        except CorruptCheckpointError as error:
            return str(error)
        return "" if report.ok else str(report.problems[0])

    def _lead(self, verify: str) -> str | None:
        try:
            found = [
                {(tag, created) for tag, created in self._hear(f"tags/{node}", node)}
                for node in range(self._info.num_nodes)
            ]
            for tag, _ in sorted(set.intersection(*found), key=lambda pair: (pair[1], pair[0]), reverse=True):
                self._say({"check": tag})
                self._put(f"said/{self.num_said}/{self._info.node}", self._look(partial(self._check, tag, verify)))
                if not any(self._hear(f"said/{self.num_said}/{node}", node) for node in range(self._info.num_nodes)):
                    return self._answer({"tag": tag})
            return self._answer({"tag": None})
        except RankFailedError as error:
            self._answer({"error": error.message, "rank": error.rank})
            raise

    def _follow(self, verify: str) -> str | None:
        while True:
            self.num_said += 1
            # A round lasts as long as the slowest node, which rank 0 gives `timeout_s`.
            said = self._await(f"say/{self.num_said}", 0, 2 * self._info.timeout_s)
            if "check" not in said:
                break
            if self._info.leads:
                self._put(
                    f"said/{self.num_said}/{self._info.node}", self._look(partial(self._check, said["check"], verify))
                )
        self._ask(one(Add(f"{self._prefix}/seen")))
        if "error" in said:
            raise RankFailedError(said["error"], rank=said["rank"], step="latest_on_all")
        tag: str | None = said["tag"]
        return tag

    def tidy(self) -> Step:
        """Rank 0: drop this question's keys once all ranks know the answer, or after `timeout_s`."""
        info, prefix = self._info, self._prefix
        yield AwaitCount(f"{prefix}/seen", info.world_size - 1, info.timeout_s)
        names = [f"tags/{node}" for node in range(info.num_nodes)] + [f"say/{k + 1}" for k in range(self.num_said)]
        names += [f"said/{k + 1}/{node}" for k in range(self.num_said) for node in range(info.num_nodes)]
        for name in (*names, "seen"):
            yield Drop(f"{prefix}/{name}")

    def _say(self, word: dict[str, Any]) -> None:
        self.num_said += 1
        self._put(f"say/{self.num_said}", word)

    def _answer(self, word: dict[str, Any]) -> str | None:
        self._say(word)
        tag: str | None = word.get("tag")
        return tag

    def _look(self, work: Callable[[], Any]) -> dict[str, Any]:
        """What this node has to say; its own failure is said too, and raised on all ranks."""
        try:
            return {"found": work()}
        except (CheckpointError, OSError) as error:
            return {"error": f"{type(error).__name__}: {error}"[:600]}

    def _hear(self, key: str, node: int) -> Any:
        said = self._await(key, node, self._info.timeout_s)
        if "error" in said:
            raise RankFailedError(
                f"node {node} could not read its checkpoints: {said['error']}", rank=None, step="latest_on_all"
            )
        return said["found"]

    def _put(self, key: str, word: Any) -> None:
        self._ask(one(Put(f"{self._prefix}/{key}", json.dumps(word))))

    def _await(self, key: str, node: int, timeout_s: float) -> Any:
        raw = self._ask(one(Await(f"{self._prefix}/{key}", timeout_s)))
        if raw is None:
            message = (
                f"node {node} has not answered within {timeout_s:g} s; every rank must ask for the newest checkpoint"
            )
            raise RankFailedError(message, rank=0 if node == 0 else None, step="latest_on_all")
        return json.loads(raw)
