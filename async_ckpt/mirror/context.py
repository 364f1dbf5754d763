"""One mirror of one engine: what all uploads to it share, and how the ranks of a job agree on one."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..errors import MirrorError
from ..format.manifest import Manifest
from ..format.names import MANIFEST_NAME
from ..metrics import MirrorMetrics, Span
from ..reading.catalog import Catalog
from ..storage.filesystem import FileLock, FileSystem
from ..threads.locks import Lock
from ..threads.outcome import run_guarded
from .config import Mirror
from .objects import read_manifest
from .state import DIRECTORY, States, TagState
from .store import Abilities, Store

_POLL_S = 0.1


class Stopped(MirrorError):
    """The mirrors are being closed. What is half sent is gone on with at the next start."""


class Agreement(Protocol):
    """How the ranks of a job agree that all objects are there; blocks."""

    rank: int | None
    """This rank, or None where there is only one."""

    @property
    def leads(self) -> bool:
        """Whether this rank puts the manifest."""

    def all_sent(self, name: str) -> None:
        """This rank's objects are there. Returns on the leader when all ranks have said so, on the others when the
        manifest is there. Raises RankFailedError: not within the time; names the ranks that were not heard of."""
        return None

    def concluded(self, name: str, error: str) -> None:
        """The leader tells the others that the manifest is there, or why it is not."""
        return None


class Alone(Agreement):
    """The agreement of a single process."""

    rank = None
    leads = True


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


@dataclass
class MirrorContext:
    """Any thread. `store` and `abilities` are set once the store has been tried. Raises WriteError: the states cannot
    be read."""

    mirror: Mirror
    filesystem: FileSystem
    root: str
    may_overwrite: bool = False
    uploaders_per_node: int | None = None
    agreement: Agreement = field(default_factory=Alone)
    hooks: MirrorHooks = field(default_factory=MirrorHooks)
    catalog: Catalog = field(init=False)
    states: States = field(init=False)
    store: Store = field(init=False)
    abilities: Abilities | None = None
    changed: Lock = field(default_factory=Lock)
    """Held to change, and notified of: what is to be done, `is_stopping`, memory for parts."""
    is_stopping: bool = False
    _free_at_s: float = 0.0

    def __post_init__(self) -> None:
        self.catalog = Catalog(self.root, self.filesystem)
        self.states = States(self.filesystem, self.root, self.mirror.url, self.agreement.rank or 0)

    def stop(self) -> None:
        """Let every thread that works for this mirror stop where it next looks."""
        with self.changed:
            self.is_stopping = True
            self.changed.notify_all()

    def wait_for(self, predicate: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Block until `predicate()`, which is asked with `changed` held, or for `timeout_s`. Raises Stopped: the
        mirrors are being closed."""
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        with self.changed:
            while not self.is_stopping and not predicate():
                left_s = None if deadline_s is None else deadline_s - time.monotonic()
                if left_s is not None and left_s <= 0:
                    break
                self.changed.wait(left_s)
            if self.is_stopping:
                raise Stopped("the mirrors were closed", url=self.mirror.url)

    def sleep(self, seconds: float = 0.0) -> None:
        """Block for so long. Raises Stopped."""
        self.wait_for(lambda: False, seconds)

    def keep_pace(self, num_bytes: int) -> None:
        """Block until `num_bytes` more may be sent. Raises Stopped."""
        start_s = 0.0
        if self.mirror.max_bytes_per_s is not None:
            with self.changed:
                start_s = max(time.monotonic(), self._free_at_s)
                self._free_at_s = start_s + num_bytes / self.mirror.max_bytes_per_s
        self.sleep(max(0.0, start_s - time.monotonic()))

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Hold one of the node's `uploaders_per_node` lock files; each is given up with the process. Raises Stopped."""
        lock: FileLock | None = None
        while self.uploaders_per_node is not None and (lock := self._try_turn()) is None:
            self.sleep(_POLL_S)
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
        """Delete what an attempt without a manifest has put, and forget it, but not that what it was to replace is this
        root's. Blocks. Raises MirrorError: the store failed; it is tried again at the next start."""
        found = read_manifest(self.store, state.tag)
        if found is None or found.attempt != state.attempt:
            for key in (*state.keys, f"{state.tag}/{MANIFEST_NAME}"):
                self.store.discard_parts(key)
            self.store.delete(state.keys)
        if found is not None and found.manifest is not None and found.attempt in state.ours:
            older = replace(state, attempt=found.attempt, created_unix_ns=found.manifest.created_unix_ns, done={})
            self.states.write(replace(older, keys=found.keys, mirrored=True, ours=()))
        else:
            self.states.forget(state.tag)
