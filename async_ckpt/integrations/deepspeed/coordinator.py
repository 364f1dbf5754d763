"""The commit of a DeepSpeed checkpoint: any save_dir, other files taken in, and `latest` as its last step.

Guarantees:
- `latest` is written after the rename, by the rank that renamed, and never goes back to an older save of this job.
- On every rank a commit succeeds only once `latest` is durable, so that whoever has waited may read it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import CheckpointError, CommitError, RankFailedError, report
from ...format.manifest import FileEntry
from ...ranks.coordinator import Coordinator, Destination, OpenTag
from ...storage import transaction
from ...storage.filesystem import FileSystem
from ...storage.root import make_root
from ...threads.locks import Lock
from ..adopting import adopt
from .agreement import Store, await_values
from .destination import DeepSpeedDestination
from .foreign import take_in
from .latest import write_latest
from .ranks import Ranks

_PARTING_S = 60.0
_DONE = "done"


class DeepSpeedCoordinator:
    """Commits for the ranks that share a tag: nearly always all of them, with one coordinator for every save_dir."""

    def __init__(self, ranks: Ranks, timeout_s: float) -> None:
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        self.leads = ranks.rank == 0 or (ranks.node is not None and ranks.rank == min(ranks.node.ranks))
        self._ranks = ranks
        self._store: Store | None = ranks.store
        self._timeout_s = timeout_s
        self._filesystem: FileSystem | None = None
        self._by_ranks: dict[tuple[int, ...], Coordinator] = {}
        self._tidied: set[str] = set()
        self._open: dict[int, tuple[Coordinator, int]] = {}
        self._num_begun = 0
        self._num_told = 0
        self.reason: BaseException | None = None
        """Why the next `abort` comes, where its caller knows better than the engine."""
        self._lock = Lock()
        self._newest: dict[str, int] = {}

    def bind(self, filesystem: FileSystem, root: str) -> None:
        self._filesystem = filesystem

    @property
    def _fs(self) -> FileSystem:
        assert self._filesystem is not None, "bind() comes first"
        return self._filesystem

    def begin(self, destination: Destination, overwrite: str) -> OpenTag:
        assert isinstance(destination, DeepSpeedDestination)
        number = self._num_begun
        self._num_begun += 1
        inner = self._coordinator(destination)
        if destination.root not in self._tidied:
            make_root(self._fs, destination.root)
            if inner.leads:
                transaction.sweep(self._fs, destination.root)
            self._tidied.add(destination.root)
        if inner.leads and overwrite == "replace":
            try:
                adopt(self._fs, destination.root, destination.tag)
            except (CheckpointError, OSError) as error:
                # It cannot be replaced then: the inner coordinator refuses, and tells the other ranks.
                report(logging.WARNING, "%s cannot be replaced: %s", destination.folder, error)
        opened = inner.begin(destination, overwrite)
        self._open[id(opened)] = (inner, number)
        return opened

    def publish(
        self, opened: OpenTag, files: Sequence[FileEntry], metadata: Mapping[str, Any], created_unix_ns: int
    ) -> None:
        inner, number = self._open[id(opened)]
        destination = opened.destination
        assert isinstance(destination, DeepSpeedDestination)
        rank = self.rank if self.world_size > 1 else None
        staging = opened.location.result()
        taken_in = take_in(self._fs, destination.folder, staging, self._ranks.folder_name, rank)
        inner.publish(opened, [*files, *taken_in], metadata, created_unix_ns)
        del self._open[id(opened)]
        is_for_all = len(destination.ranks) == self.world_size
        failure = self._finish(destination, number) if self.rank == 0 or (self.leads and is_for_all) else None
        if is_for_all and self.rank == 0:
            self._tell_finished(number, failure)
        elif is_for_all:
            self._hear_finished(number)
        if failure is not None:
            raise failure

    def abort(self, opened: OpenTag, error: BaseException) -> None:
        found = self._open.pop(id(opened), None)
        reason, self.reason = self.reason, None
        # Without an entry the checkpoint is visible already, and only what came after failed.
        if found is not None:
            found[0].abort(opened, reason or error)

    def sweep(self) -> None:
        # Each root is swept when it is first used.
        return

    def close(self) -> None:
        self._part()
        for inner in self._by_ranks.values():
            inner.close()

    def _coordinator(self, destination: DeepSpeedDestination) -> Coordinator:
        inner = self._by_ranks.get(destination.ranks)
        if inner is None:
            inner = self._by_ranks[destination.ranks] = self._ranks.coordinator(destination.ranks, self._timeout_s)
            inner.bind(self._fs, destination.root)
        return inner

    def _finish(self, destination: DeepSpeedDestination, number: int) -> CommitError | None:
        """The checkpoint is committed: make `latest` name it."""
        with self._lock:
            # Commits may end in another order than they began.
            if not destination.save_latest or number < self._newest.get(destination.save_dir, 0):
                return None
            try:
                write_latest(self._fs, destination.save_dir, destination.full_tag)
            except CommitError as error:
                return error
            self._newest[destination.save_dir] = number
            return None

    def _tell_finished(self, number: int, failure: CommitError | None) -> None:
        with self._lock:
            self._num_told += 1
        if self._store is not None:
            self._store.set(f"latest/{number}", _DONE if failure is None else str(failure))

    def _hear_finished(self, number: int) -> None:
        assert self._store is not None
        (said,) = await_values(self._store, [f"latest/{number}"], self._timeout_s, "that the checkpoint is finished")
        if self._store.add(f"heard/{number}", 1) == self.world_size - 1:
            self._store.delete_key(f"latest/{number}")
            self._store.delete_key(f"heard/{number}")
            self._store.add("heard", 1)
        if said != _DONE:
            raise RankFailedError(said, rank=0, step="latest")

    def _part(self) -> None:
        """Rank 0 often holds the store: it must not leave before the others have heard how their checkpoints ended."""
        if self._store is None or self.rank != 0:
            return
        deadline = time.monotonic() + min(_PARTING_S, self._timeout_s)
        try:
            while (num_heard := self._store.add("heard", 0)) < self._num_told:
                if time.monotonic() > deadline:
                    report(
                        logging.WARNING,
                        "%d checkpoint(s) are committed, but some rank has not heard of it",
                        self._num_told - num_heard,
                    )
                    return
                time.sleep(0.005)
        except RuntimeError as error:
            report(
                logging.WARNING, "the store went away before every rank had heard how its checkpoints ended: %s", error
            )
