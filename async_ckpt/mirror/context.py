"""One mirror of one engine: what all uploads to it share, and how the ranks of a job agree on one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..format.manifest import Manifest
from ..metrics import MirrorMetrics, Span
from ..reading.catalog import Catalog
from ..storage.filesystem import FileLock, FileSystem
from ..threads.pending import run_guarded
from .config import Mirror
from .probe import Abilities
from .remote_manifest import read_manifest
from .state import DIRECTORY, States, TagState
from .store import Store

T = TypeVar("T")
_POLL_S = 0.1


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
class MirrorHooks:
    """What the mirrors tell, on their own threads. None of them may raise."""

    on_span: Callable[[Span], object] = lambda span: None
    on_ended: Callable[[MirrorMetrics, BaseException | None], object] = lambda metrics, error: None
    retain: Callable[[Mirror, Catalog, Callable[[Manifest], object]], object] = lambda mirror, catalog, remove: None
    """Let the mirror's retention work on this catalog, by this removal; may block.
    Raises ConfigError (the policy cannot judge), MirrorError."""
    on_mirrored: Callable[[], object] = lambda: None
    """A checkpoint is in the mirror; may block."""
    run_callback: Callable[[Callable[[], object]], object] = run_guarded
    """Runs the user's callbacks of a `PendingMirror`; must not block."""


class Pace:
    """Bounds a rate by sleeping; None bounds nothing. One event loop."""

    def __init__(self, max_bytes_per_s: float | None) -> None:
        self._max_bytes_per_s = max_bytes_per_s
        self._free_at_s = 0.0

    async def wait(self, num_bytes: int) -> None:
        """Return when `num_bytes` more may be sent."""
        if self._max_bytes_per_s is None:
            return
        now_s = time.monotonic()
        start_s = max(now_s, self._free_at_s)
        self._free_at_s = start_s + num_bytes / self._max_bytes_per_s
        await asyncio.sleep(start_s - now_s)


@dataclass
class MirrorContext:
    """Made on any thread; its coroutines belong to the mirrors' event loop. `store` and `abilities` are set once the
    store has been tried.

    Raises:
        WriteError: the states cannot be read.
    """

    mirror: Mirror
    filesystem: FileSystem
    root: str
    executor: Executor
    agreement: Agreement
    may_overwrite: bool
    uploaders_per_node: int | None
    hooks: MirrorHooks
    catalog: Catalog = field(init=False)
    states: States = field(init=False)
    pace: Pace = field(init=False)
    store: Store = field(init=False)
    abilities: Abilities | None = None

    def __post_init__(self) -> None:
        self.catalog = Catalog(self.root, self.filesystem)
        self.states = States(self.filesystem, self.root, self.mirror.url, self.agreement.rank or 0)
        self.pace = Pace(self.mirror.max_bytes_per_s)

    async def in_thread(self, call: Callable[..., T], *args: Any) -> T:
        """`call` on one of the mirrors' threads."""
        return await asyncio.get_running_loop().run_in_executor(self.executor, call, *args)

    async def opened(self, call: Callable[[], T]) -> T:
        """What `call` opens on a thread (or None); closed again where the waiting is cancelled in between."""
        opening = asyncio.get_running_loop().run_in_executor(self.executor, call)
        try:
            return await asyncio.shield(opening)
        except asyncio.CancelledError:
            await asyncio.wait([opening])
            found: Any = None if opening.exception() is not None else opening.result()
            if found is not None:
                found.close()
            raise

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Hold one of the node's `uploaders_per_node` lock files; each is given up with the process."""
        lock: FileLock | None = None
        while self.uploaders_per_node is not None and lock is None:
            lock = await self.opened(self._try_turn)
            if lock is None:
                await asyncio.sleep(_POLL_S)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    def _try_turn(self) -> FileLock | None:
        folder, host = os.path.join(self.root, DIRECTORY), self.filesystem.owner().host
        self.filesystem.makedirs(folder)
        for number in range(self.uploaders_per_node or 0):
            path = os.path.join(folder, f"uploader.{host}.{number}")
            with contextlib.suppress(FileExistsError):
                self.filesystem.create_file(path, b"")
            lock = self.filesystem.lock(path)
            if lock is not None:
                return lock
        return None

    def abandon(self, state: TagState) -> None:
        """Delete what an attempt without a manifest has put, and forget it. Blocks.

        Raises:
            MirrorError: the store failed; it is tried again at the next start.
        """
        found = read_manifest(self.store, state.tag)
        if found is None or found.attempt != state.attempt:
            for key in state.keys:
                self.store.discard_parts(key)
            self.store.delete(state.keys)
        self.states.forget(state.tag)
