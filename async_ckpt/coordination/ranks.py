"""Many ranks, one checkpoint: every rank writes its own files, rank 0 renames, all ranks report the same outcome.

Guarantees:
- Shared root (the default): nothing is renamed before every rank's part is durable; then one rename makes all of it visible.
- Node-local roots (`node=`): no node renames before every rank of every node is durable. Each node's lowest rank then renames its own
  directory; a crash in that moment can leave the tag on some nodes only, so restart from the newest tag that all nodes have.
  Where a rename failed, all ranks raise `CommitError` with `committed=None` that names the nodes.
- A rank that raises, is killed, hangs, names another tag or runs out of disk fails the commit on every surviving rank within
  `timeout_s` of its own part being durable, with `RankFailedError` (`rank`, cause); nothing is renamed, and the next checkpoint
  works. If rank 0 vanishes after it has decided to rename, the others learn within twice that time that the outcome is unknown.
- Nothing here runs a collective or uses a process group. See `rank_protocol` for the cost on the store.
"""

from __future__ import annotations

import concurrent.futures
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from .. import transaction
from ..checksum import crc32
from ..errors import CheckpointError, CommitError, ConfigError, RankFailedError
from ..filesystem import FileSystem
from ..manifest import FileEntry, Manifest
from ..writer.executor import DaemonExecutor
from . import OpenTag, rank_protocol
from .rank_env import Node, default_run_id, node_from_env
from .rank_parts import merge_parts, write_part
from .rank_requests import Announcements, AttemptFailed, Seat, Step, Verdict
from .store_link import LinkLostError, StoreLink, private_connection

__all__ = ["Node", "RankCoordinator", "RankTag"]

logger = logging.getLogger("async_ckpt")

_PROMPT_REMOVAL_S = 1.0


@dataclass(slots=True)
class RankTag(OpenTag):
    """A checkpoint that this rank stages with others."""

    attempt: Future[int] = field(default_factory=Future)
    verdict: Verdict | None = None
    """How it ended, once this rank has learnt it."""


class RankCoordinator:
    """Commits as one of `world_size` ranks that share a ``torch.distributed`` store. Give it to the engine as `coordinator`.

    Args:
        store: a TCPStore, FileStore, HashStore or PrefixStore on them, the same for all ranks. It is cloned where torch can do that.
        timeout_s: how far apart the ranks' `create` calls, and their parts becoming durable, may be.
        run_id: a text that all ranks share and that is new in every run; needed where the store outlives a run (FileStore).
            By default torchrun's run id and restart count.
        node: this node, where each node has a root of its own; None for one root on a file system that all ranks see.
        channel: keeps several engines over one store apart; by default made from the root's path.
        linger_s: how long `close` waits for the other ranks to read the last outcome.

    Raises:
        ConfigError: ranks, nodes or run id do not fit.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        *,
        timeout_s: float = 600.0,
        run_id: str | None = None,
        node: Node | None = None,
        channel: str | None = None,
        linger_s: float = 10.0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not in a job of {world_size} ranks")
        if node is not None and (rank not in node.ranks or not 0 <= node.number < node.num_nodes):
            raise ConfigError(f"rank {rank} is not among the ranks {node.ranks} of node {node.number} of {node.num_nodes}")
        if not 0 < timeout_s < float("inf"):
            raise ConfigError(f"timeout_s must be a positive number of seconds, not {timeout_s!r}")
        self.rank = rank
        self.world_size = world_size
        self.seat = Seat(rank, world_size, timeout_s)
        if node is not None:
            self.seat = Seat(rank, world_size, timeout_s, node.number, node.num_nodes, tuple(sorted(node.ranks)))
        self._store = store
        self._run_id = run_id if run_id is not None else default_run_id(store)
        self._channel = channel
        self._linger_s = linger_s
        self._known = Announcements()
        self._lock = threading.Lock()
        self._background: list[Future[Any]] = []
        self._unretired: set[int] = set()
        self._filesystem: FileSystem | None = None
        self._link: StoreLink | None = None
        self._root = ""
        self._cleaner: DaemonExecutor | None = None

    @classmethod
    def from_env(cls, **options: Any) -> RankCoordinator:
        """For a script under torchrun, or one that has called ``init_process_group``: rank, size and store come from there.

        ``node_local=True`` means that each node has a root of its own. Other options as in the class. Blocks until the store answers.
        """
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        if dist.is_initialized():
            store, rank, world_size = dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size()
        else:
            store, rank, world_size = next(iter(rendezvous("env://")))
        if options.pop("node_local", False):
            options["node"] = node_from_env(rank, world_size)
        return cls(store, rank, world_size, **options)

    @property
    def leads(self) -> bool:
        """Whether this rank makes, renames and sweeps staging directories."""
        return self.seat.leads

    # The engine's calls; see `coordination.Coordinator`.

    def bind(self, filesystem: FileSystem, root: str) -> None:
        if self._link is not None:
            raise ConfigError("this RankCoordinator has an engine already; make one for each engine")
        self._filesystem, self._root = filesystem, root
        self._cleaner = DaemonExecutor("async-ckpt-ranks-cleanup", 1)
        channel = self._channel or ("node-local" if self.seat.num_nodes > 1 else f"{crc32(root.encode()):08x}")
        store = self._store
        self._link = StoreLink(lambda: private_connection(store), f"async_ckpt/{self._run_id}/{channel}/", world_size=self.world_size)

    def begin(self, tag: str, overwrite: str) -> RankTag:
        staging = None
        if self.leads:
            try:
                staging = transaction.begin(self._fs, self._root, tag, overwrite)
            except Exception as error:
                self._tell_begin_failed(tag, error)
                raise
        opened = RankTag(tag, overwrite, Future(), staging)
        if self.rank == 0:
            assert staging is not None
            opened.attempt = self._submit(rank_protocol.announce(self.seat, tag, os.path.basename(staging.path)))
        else:
            opened.attempt = self._submit(self._join(opened))
        if staging is not None:
            opened.location.set_result(staging.path)
        else:
            opened.attempt.add_done_callback(lambda attempt: self._location_failed(opened, attempt))
        return opened

    def publish(self, opened: OpenTag, files: Sequence[FileEntry], metadata: Mapping[str, Any], created_unix_ns: int) -> None:
        assert isinstance(opened, RankTag)
        attempt = self._learn(opened, opened.attempt)
        part = Manifest(opened.tag, created_unix_ns, tuple(files))
        digest = write_part(self._fs, opened.location.result(), self.rank, part)
        self._learn(opened, self._submit(rank_protocol.report(self.seat, attempt, digest)))
        if self.rank == 0:
            self._publish_as_first(opened, attempt, metadata, created_unix_ns)
        elif self.leads:
            self._publish_own_node(opened, attempt, metadata)
        else:
            opened.verdict = self._learn(opened, self._submit(rank_protocol.await_result(self.seat, attempt)), reported=True)
            self._later(rank_protocol.settle(self.seat, attempt))

    def abort(self, opened: OpenTag, error: BaseException) -> None:
        assert isinstance(opened, RankTag)
        attempt: int | None = None
        if self.rank == 0 or opened.attempt.done():
            try:
                attempt = self._learn(opened, opened.attempt)
                if opened.verdict is None:
                    opened.verdict = self._learn(opened, self._submit(rank_protocol.fail(self.seat, attempt, _cause(error))))
            except CommitError as failure:
                cause = failure.__cause__
                attempt = cause.attempt if isinstance(cause, AttemptFailed) else attempt
                if not isinstance(cause, AttemptFailed):
                    logger.warning("the other ranks could not be told that %r was given up: %s", opened.tag, failure)
        else:
            self._tell_once_joined(opened, error)
        self._leave(opened, attempt)

    def sweep(self) -> None:
        if self.leads:
            transaction.sweep(self._fs, self._root)

    def close(self) -> None:
        deadline = time.monotonic() + min(self._linger_s, self.seat.timeout_s)
        while time.monotonic() < deadline:
            with self._lock:
                waiting = [future for future in self._background if not future.done()]
            if not waiting:
                break
            concurrent.futures.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if self._link is not None:
            # A later engine over this store must not take these for its own.
            dropped = [self._link.submit(rank_protocol.retire(self.seat, attempt, 0.0)) for attempt in tuple(self._unretired)]
            concurrent.futures.wait(dropped, timeout=self._linger_s)
            self._link.close()
        if self._cleaner is not None:
            self._cleaner.shutdown(wait=False)
            self._cleaner.join(self._linger_s)

    # Beginning.

    def _tell_begin_failed(self, tag: str, error: BaseException) -> None:
        def tell() -> Step:
            if self.rank == 0:
                attempt = yield from rank_protocol.announce(self.seat, tag, None, _cause(error))
                yield from self._retire(attempt)
            else:
                attempt, _ = yield from rank_protocol.join(self.seat, tag, self._known)
                yield from rank_protocol.fail(self.seat, attempt, _cause(error))
                yield from rank_protocol.settle(self.seat, attempt)

        self._later(tell())

    def _tell_once_joined(self, opened: RankTag, error: BaseException) -> None:
        """This rank gave up before rank 0 had begun: the others are told as soon as there is somebody to tell."""
        told: Future[None] = Future()

        def joined(attempt: Future[int]) -> None:
            if attempt.exception() is None:
                self._later(rank_protocol.fail(self.seat, attempt.result(), _cause(error)))
                self._later(rank_protocol.settle(self.seat, attempt.result()))
            told.set_result(None)

        self._track(told)
        opened.attempt.add_done_callback(joined)

    def _join(self, opened: RankTag) -> Step:
        """Another rank's way into an attempt; resolves the location."""
        seat = self.seat
        attempt, announcement = yield from rank_protocol.join(seat, opened.tag, self._known)
        if opened.staging is not None:
            yield from rank_protocol.open_node(seat, attempt, os.path.basename(opened.staging.path))
            return attempt
        name = announcement["name"]
        if announcement["node"] != seat.node:
            name = yield from rank_protocol.await_node(seat, attempt)
        try:
            location = transaction.join(self._fs, self._root, opened.tag, name).path
        except (CheckpointError, OSError) as error:
            verdict = yield from rank_protocol.fail(seat, attempt, _cause(error))
            raise AttemptFailed(attempt, verdict) from error
        opened.location.set_result(location)
        return attempt

    def _location_failed(self, opened: RankTag, attempt: Future[int]) -> None:
        error = attempt.exception()
        if error is not None:
            opened.location.set_exception(self._translated(opened, error, reported=False))

    # Committing.

    def _publish_as_first(self, opened: RankTag, attempt: int, metadata: Mapping[str, Any], created_unix_ns: int) -> None:
        seat = self.seat
        digests = self._learn(opened, self._submit(rank_protocol.gather(seat, attempt)))
        assert opened.staging is not None
        entries = merge_parts(self._fs, opened.staging.path, seat.group, digests)
        self._learn(opened, self._submit(rank_protocol.decide(seat, attempt, created_unix_ns)))
        try:
            self._rename(opened, entries, metadata, created_unix_ns)
        except BaseException as error:
            committed = error.committed if isinstance(error, CommitError) else False
            opened.verdict = Verdict(False, 0, _cause(error), 0, committed)
            self._tell_outcome(opened, attempt, opened.verdict, _cause(error))
            raise
        opened.verdict = Verdict(True, None, "", 0, True)
        self._tell_outcome(opened, attempt, opened.verdict, "")
        self._later(self._retire(attempt))

    def _tell_outcome(self, opened: RankTag, attempt: int, verdict: Verdict, error: str) -> None:
        seat = self.seat
        if seat.num_nodes > 1:
            self._submit(rank_protocol.renamed(seat, attempt, error))
            verdict = self._learn(opened, self._submit(rank_protocol.conclude_nodes(seat, attempt)), reported=True)
            if not verdict.ok and not error:
                opened.verdict = verdict
                raise self._error(opened, verdict)
            return
        try:
            self._learn(opened, self._submit(rank_protocol.conclude(seat, attempt, verdict)))
        except CommitError as lost:
            # The rename has been done, or not, already: the others find out by listing the root.
            logger.error("the other ranks could not be told what became of checkpoint %r: %s", opened.tag, lost)

    def _publish_own_node(self, opened: RankTag, attempt: int, metadata: Mapping[str, Any]) -> None:
        seat = self.seat
        decided = self._learn(opened, self._submit(rank_protocol.await_decision(seat, attempt)), reported=True)
        error = ""
        try:
            digests = self._learn(opened, self._submit(rank_protocol.parts(seat, attempt)))
            assert opened.staging is not None
            entries = merge_parts(self._fs, opened.staging.path, seat.group, digests)
            self._rename(opened, entries, metadata, decided.created_unix_ns)
        except (CheckpointError, OSError) as failure:
            error = _cause(failure)
        self._learn(opened, self._submit(rank_protocol.renamed(seat, attempt, error)), reported=True)
        opened.verdict = self._learn(opened, self._submit(rank_protocol.await_result(seat, attempt)), reported=True)
        self._later(rank_protocol.settle(seat, attempt))

    def _rename(self, opened: RankTag, entries: list[FileEntry], metadata: Mapping[str, Any], created_unix_ns: int) -> None:
        assert opened.staging is not None
        marks = {}
        if self.seat.num_nodes > 1:
            marks = {"shared": "False", "node": str(self.seat.node), "num_nodes": str(self.seat.num_nodes)}
        transaction.publish(self._fs, opened.staging, entries, metadata, created_unix_ns, marks=marks)

    # Leaving.

    def _leave(self, opened: RankTag, attempt: int | None) -> None:
        """Remove what is staged once no rank writes there any more, and tidy the store up."""
        staging = opened.staging
        if staging is None or attempt is None:
            if attempt is not None:
                self._later(rank_protocol.settle(self.seat, attempt))
            if staging is not None:
                transaction.abort(self._fs, staging)
            return
        removed: Future[None] = Future()

        def remove() -> None:
            transaction.abort(self._fs, staging)
            self._later(self._retire(attempt) if self.rank == 0 else rank_protocol.settle(self.seat, attempt))

        def others_quit(_: Future[Any]) -> None:
            # Also where the link was lost: an unremoved directory would hold its space until this process ends.
            assert self._cleaner is not None
            _chain(self._cleaner.submit(remove), removed)

        self._track(removed)
        self._submit(rank_protocol.await_quit(self.seat, attempt)).add_done_callback(others_quit)
        concurrent.futures.wait([removed], timeout=min(_PROMPT_REMOVAL_S, self.seat.timeout_s / 4))

    def _retire(self, attempt: int) -> Step:
        with self._lock:
            self._unretired.add(attempt)
        yield from rank_protocol.retire(self.seat, attempt)
        with self._lock:
            self._unretired.discard(attempt)

    # Talking.

    @property
    def _fs(self) -> FileSystem:
        assert self._filesystem is not None, "bind() comes first"
        return self._filesystem

    def _submit(self, step: Step) -> Future[Any]:
        assert self._link is not None, "bind() comes first"
        return self._link.submit(step)

    def _later(self, step: Step) -> None:
        self._track(self._submit(step))

    def _track(self, future: Future[Any]) -> None:
        with self._lock:
            self._background = [known for known in self._background if not known.done()]
            self._background.append(future)

    def _learn(self, opened: RankTag, future: Future[Any], *, reported: bool = False) -> Any:
        """The result of a protocol step; `reported` says that the others may publish without this rank.

        Raises:
            RankFailedError, CommitError: the attempt is over; the verdict is kept in `opened`.
        """
        try:
            # The steps bound themselves; this bound is for a store that hangs in the middle of a request.
            return future.result(2 * self.seat.timeout_s + 60.0)
        except concurrent.futures.TimeoutError:
            error: BaseException = LinkLostError("the store has not answered for a long time")
        except (AttemptFailed, LinkLostError) as failure:
            error = failure
        raise self._translated(opened, error, reported) from error

    def _translated(self, opened: RankTag, error: BaseException, reported: bool) -> BaseException:
        if isinstance(error, AttemptFailed):
            opened.verdict = error.verdict
            translated: BaseException = self._error(opened, error.verdict)
        elif isinstance(error, LinkLostError):
            translated = self._error(opened, Verdict(False, None, str(error), self.rank, None if reported else False))
        else:
            return error
        translated.__cause__ = error
        return translated

    def _error(self, opened: RankTag, verdict: Verdict) -> CommitError:
        who = "the ranks have lost each other" if verdict.rank is None else f"rank {verdict.rank} failed"
        if verdict.committed is None:
            state = f"whether checkpoint {opened.tag!r} is visible is unknown: list {self._root!r}"
            return CommitError(f"{who}: {verdict.cause}; {state}", step="ranks", committed=None)
        state = f"checkpoint {opened.tag!r} is not visible on any rank, older ones are untouched"
        return RankFailedError(f"{who}: {verdict.cause}; {state}", rank=verdict.rank)


def _cause(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:600]


def _chain(source: Future[None], target: Future[None]) -> None:
    def done(ended: Future[None]) -> None:
        error = ended.exception()
        if error is not None:
            logger.warning("a staging directory could not be removed: %s", error)
        target.set_result(None)

    source.add_done_callback(done)
