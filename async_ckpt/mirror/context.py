"""What all uploads to one mirror share, and how the ranks of a job agree on one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Protocol

from ..metrics import Span
from ..reading.catalog import Catalog
from .config import Mirror
from .parts import Pace
from .probe import Abilities
from .remote_manifest import read_manifest
from .state import States, TagState
from .store import Store
from .turns import UploadTurns


class Agreement(Protocol):
    """How the ranks of a job agree that all objects are there; blocks."""

    rank: int | None
    """This rank, or None where there is only one."""

    @property
    def leads(self) -> bool:
        """Whether this rank puts the manifest."""

    def all_sent(self, name: str) -> None:
        """This rank's objects are there. Returns on the leader when all ranks have said so, on the others when the
        manifest is there.

        Raises:
            RankFailedError: not within the time; names the ranks that were not heard of.
        """

    def concluded(self, name: str, error: str) -> None:
        """The leader tells the others that the manifest is there, or why it is not."""


class Alone:
    """The agreement of a single process."""

    rank: int | None = None
    leads = True

    def all_sent(self, name: str) -> None:
        return None

    def concluded(self, name: str, error: str) -> None:
        return None


@dataclass(frozen=True)
class UploadContext:
    """What all uploads to one mirror share."""

    mirror: Mirror
    store: Store
    abilities: Abilities
    states: States
    catalog: Catalog
    executor: Executor
    pace: Pace
    turns: UploadTurns
    agreement: Agreement
    may_overwrite: bool
    on_span: Callable[[Span], object]


def abandon(context: UploadContext, state: TagState) -> None:
    """Delete what an attempt without a manifest has put, and forget it. Blocks.

    Raises:
        MirrorError: the store failed; it is tried again at the next start.
    """
    found = read_manifest(context.store, state.tag)
    if found is None or found.attempt != state.attempt:
        for key in state.keys:
            context.store.discard_parts(key)
        context.store.delete(state.keys)
    context.states.forget(state.tag)
