"""Which committed file a new one may share its bytes with: the last one of the same path that this engine has
committed, where both have the same layout."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import report
from ..plan.plan import PlannedState
from ..snapshot.untouched import SeenState
from ..writer.sharing import FindOlder, OlderFile

if TYPE_CHECKING:
    from .checkpoint import Checkpoint

_NUM_PATHS = 256
"""At least so many are remembered: where each checkpoint has others, the oldest are forgotten."""


class Reuse:
    """What an engine knows of its committed files. Calls come from `save`, and from commits; never blocks."""

    def __init__(self, *, is_on: bool) -> None:
        self.is_on = is_on
        self._seen: dict[str, SeenState] = {}
        """By path, of the last save."""
        self._committed: dict[str, tuple[SeenState, OlderFile]] = {}
        """By path."""

    def tell(self, root: str, *, clones: bool) -> None:
        """Say once how files are shared in `root`."""
        how = "chunks that did not change share their blocks with the last checkpoint's (reuse='auto')"
        if not clones:
            how = "files that did not change are hard links to the last checkpoint's (reuse='auto'; no reflinks here)"
        if self.is_on:
            report(logging.INFO, "root %r: %s", root, how)

    def see(self, path: str, state: PlannedState) -> SeenState | None:
        """What is to be remembered of a state that is saved as `path` now; None where its file shares nothing."""
        if not state.plan.payload_nbytes:
            return None
        seen = SeenState(state, self._seen.get(path))
        _remember(self._seen, {path: seen})
        return seen

    def older(self, path: str, seen: SeenState) -> FindOlder | None:
        """What finds, on an I/O thread, the file that the new one of this state may share bytes with."""
        known = self._committed.get(path)
        if known is None or known[0].plan_hash != seen.plan_hash:
            return None
        before, older = known
        return lambda: replace(older, untouched=seen.untouched(before, older.extent_bytes))

    def committed(self, checkpoint: Checkpoint) -> None:
        """Remember the files of a checkpoint that has been committed."""
        found = {}
        for path, saved in checkpoint.files.items():
            write, stamp = saved.write, saved.write.stamp
            if saved.seen is not None and stamp is not None:
                root, parts, crcs = checkpoint.staging.root, (checkpoint.tag, *path.split("/")), write.extent_crc32
                older = OlderFile(root, parts, stamp, write.size_bytes, write.extent_bytes, tuple(crcs), ())
                found[path] = saved.seen, older
        _remember(self._committed, found)


def _remember(known: dict[str, Any], more: dict[str, Any]) -> None:
    for path in more:
        known.pop(path, None)
    known.update(more)
    for path in list(known)[: -max(len(more), _NUM_PATHS)]:
        known.pop(path, None)
