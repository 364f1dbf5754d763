"""An engine's part about reading back."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, Literal

from ..errors import BackpressureTimeout, report
from ..format.names import Root
from ..reading.catalog import Catalog
from ..reading.load import load_committed, load_committed_into
from .commits import Commits
from .config import EngineConfig
from .interface import StrPath
from .mirroring import latest_of
from .pending import PendingCommit
from .pipeline import SavePipeline


class RestoringEngine:
    """What an engine loads, and finds."""

    config: EngineConfig
    _paths: Root
    _catalog: Catalog
    _inflight: Commits
    _pipeline: SavePipeline

    def load(
        self,
        path: StrPath,
        map_location: Any = None,
        *,
        weights_only: bool | None = None,
        verify: str = "full",
        mmap: bool | None = None,
    ) -> Any:
        """Load the committed file "<tag>/file.pt" (or "<root>/<tag>/file.pt") and check every byte. Blocks; any thread.

        A commit of that tag that is pending here is waited for first. For the arguments and errors see
        `async_ckpt.load`.
        """
        catalog, tag, name = self._committed_path(path)
        return load_committed(
            catalog, tag, name, map_location=map_location, weights_only=weights_only, verify=verify, mmap=mmap
        )

    def load_into(
        self,
        state_dict: Any,
        path: StrPath,
        *,
        strict: bool = True,
        verify: str = "full",
        atomic: bool | Literal["auto"] = "auto",
        weights_only: bool | None = None,
        select: str | None = None,
    ) -> Any:
        """Read a committed file in parallel straight into the tensors of `state_dict`. Blocks; any thread.

        Lazy snapshots are waited for first. Returns the loaded structure's other leaves. For the arguments (`atomic`
        says what the tensors hold after an error) and errors see `async_ckpt.load_into`.
        """
        catalog, tag, name = self._committed_path(path)
        self._pipeline.guard.wait(block=True)
        how: Any = {
            "strict": strict,
            "verify": verify,
            "atomic": atomic,
            "weights_only": weights_only,
            "lend": self._pipeline.arena.lend,
        }
        return load_committed_into(catalog, tag, name, state_dict, select=select, **how)

    def latest(self, verify: str = "full", *, tier: Literal["disk", "any"] = "disk") -> str | None:
        """Newest committed tag that verifies, or None; logs which ones it skipped and why. Blocks for the reading.

        With `tier="any"` also of the mirrors; `load` and `load_into` read from there what the disk lacks.
        Pending commits of other engines of this process in the same root are waited for first (a retry may still hold
        one); BackpressureTimeout where they do not end.
        """
        others = self._inflight.others()
        self._await(pending for other in others for pending in other.unfinished())
        for pending in [pending for other in others for pending in other.unacknowledged()]:
            told = "checkpoint %r of another engine of this process on %r was not committed: %s"
            report(logging.WARNING, told, pending.tag, self._inflight.root, pending.failure())
        return latest_of(self._catalog, self._inflight.mirrors, verify, tier)

    def tags(self) -> list[str]:
        """Committed tags, oldest first."""
        return self._catalog.tags()

    def _committed_path(self, path: StrPath) -> tuple[Catalog, str, str]:
        self._inflight.check_usable()
        tag, name = self._paths.split_committed(path)
        self._await_commit(tag)
        mirrors = self._inflight.mirrors
        return self._catalog if mirrors is None else mirrors.resume_from(tag, self._catalog), tag, name

    def _await_commit(self, tag: str) -> None:
        """Wait for pending commits of this tag in this process, if there are any."""
        engines = (self._inflight, *self._inflight.others())
        self._await(found for each in engines if (found := each.find_unfinished(tag)) is not None)

    def _await(self, commits: Iterable[PendingCommit]) -> None:
        timeout_s = self.config.backpressure_timeout_s
        for pending in list(commits):
            if not pending.wait(timeout_s):
                raise BackpressureTimeout(
                    f"the commit of {pending.tag!r} did not end within {timeout_s:g} s; it goes on"
                )
