"""What a first save would otherwise pay for, paid before: memory faulted in, structures planned."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from ..errors import report
from ..plan.planner import Planner
from ..snapshot.arena import StagingArena
from ..snapshot.snapshotter import Snapshotter


class Warmup:
    """Warms one engine's arena and planner, in the background or at once.

    Args:
        background: where `begin` works; nothing there keeps the engine alive.
    """

    def __init__(
        self, arena: StagingArena, planner: Planner, snapshotter: Snapshotter, background: Callable[[Callable[[], None]], Future[None]]
    ) -> None:
        self._arena = arena
        self._planner = planner
        self._snapshotter = snapshotter
        self._background = background

    def begin(self, target_bytes: int) -> None:
        """Fault in memory until `target_bytes` are warm, in the background. A failure is warned about: saves are slower then."""
        # A closure over the arena alone: the background thread must not keep the engine alive.
        arena = self._arena
        self._begin(lambda: arena.fault_in(target_bytes))

    def begin_more(self, more_bytes: int) -> None:
        """`begin` for so many bytes on top of what is warm already."""
        self.begin(self._arena.num_faulted * self._arena.chunk_bytes + more_bytes)

    def _begin(self, work: Callable[[], None]) -> None:
        self._background(work).add_done_callback(_warn_of_failure)

    def plan(self, states: Mapping[str, Any]) -> int:
        """Plan `states` (by path inside a tag) for later saves; returns the staging bytes they need. The planner's thread."""
        return sum(self._snapshotter.plan_ahead(self._planner.plan(state, name=name).plan, name) for name, state in states.items())

    def fault_in(self, num_bytes: int | None) -> None:
        """Block until `num_bytes` (None: all) of the staging memory are warm."""
        size = self._arena.num_chunks * self._arena.chunk_bytes
        self._arena.fault_in(size if num_bytes is None else min(size, num_bytes))


def _warn_of_failure(done: Future[None]) -> None:
    if not done.cancelled() and done.exception() is not None:
        report(
            logging.WARNING,
            "faulting in staging memory ahead failed, the first saves will be slower: %s",
            done.exception(),
            warning=RuntimeWarning,
        )
