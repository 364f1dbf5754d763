"""Many ranks, one checkpoint: every rank writes its own files, rank 0 renames, all ranks report the same outcome.

Guarantees:
- Shared root (the default): nothing is renamed before every rank's part is durable; then one rename makes all of it
  visible.
- Node-local roots (`node=`): no node renames before every rank of every node is durable. Each node's lowest rank then
  renames its own directory; a crash in that moment can leave the tag on some nodes only, so restart from
  `latest_on_all()`. Where a rename failed, all ranks raise `CommitError` with `committed=None` that names the nodes.
- A rank that raises, is killed, hangs, names another tag or runs out of disk fails the commit on every surviving rank
  within `timeout_s` of its own part being durable, with `RankFailedError` (`rank`, cause); nothing is renamed, and the
  next checkpoint works. Ranks that wait for each other in different tags fail both within seconds.
- If rank 0 vanishes after it has decided to rename, the others learn within twice that time that the outcome is
  unknown.
- Nothing but `load_once` runs a collective or uses a process group. See `rank_protocol` for the cost on the store.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from ..errors import CheckpointError, CommitError, ConfigError, RankFailedError, check_positive, report
from ..format.checksum import crc32
from ..format.manifest import Manifest
from ..format.names import StrPath
from ..host.facts import Node, node_from_env
from ..reading.catalog import Catalog
from ..storage import transaction
from ..storage.filesystem import FileSystem
from ..storage.staged import Destination, Staging
from ..threads.executor import DaemonExecutor
from . import protocol as rank_protocol
from .exchange import Exchange
from .joining import Joining, RankStaging
from .latest_on_all import latest_on_all
from .rank_parts import merge_parts, write_part
from .rank_requests import AttemptFailed, CommitOutcome, RankInfo, Step, cause_of
from .store_link import LinkLostError, StoreLink, default_run_id, private_connection

__all__ = ["Node", "RankCoordinator", "RankStaging"]

_PROMPT_REMOVAL_S = 1.0


class RankCoordinator:
    """Commits as one of `world_size` ranks that share a ``torch.distributed`` store. Give it to the engine as
    `coordinator`.

    Args:
        store: a TCPStore, FileStore, HashStore or PrefixStore on them, the same for all ranks. It is cloned where torch
            can do that.
        timeout_s: how far apart the ranks' `create` calls, and their parts becoming durable, may be.
        run_id: a text that all ranks share and that is new in every run; needed where the store outlives a run
            (FileStore). By default torchrun's run id and restart count.
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
            raise ConfigError(f"rank {rank} is not among the ranks {node.ranks} of node {node.number}/{node.num_nodes}")
        check_positive("timeout_s", timeout_s)
        self.rank, self.world_size = rank, world_size
        place = () if node is None else (node.number, node.num_nodes, tuple(sorted(node.ranks)))
        self.info = RankInfo(rank, world_size, timeout_s, *place)
        self.leads = self.info.leads
        self.num_sharing = world_size if node is None or node.num_nodes == 1 else 1
        self._store = store
        self._run_id = run_id if run_id is not None else default_run_id(store)
        self._channel = channel
        self._linger_s = linger_s
        self._exchanges: dict[str, Exchange] = {}
        self._link: StoreLink | None = None
        # Since `bind`.
        self._root: str
        self._fs: FileSystem
        self._joining: Joining
        self._cleaner: DaemonExecutor

    @classmethod
    def from_env(cls, **options: Any) -> RankCoordinator:
        """For a script under torchrun, or one that has called ``init_process_group``: rank, size and store come from
        there.

        ``node_local=True`` means that each node has a root of its own. Other options as in the class. Blocks until the
        store answers.
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

    # The engine's calls; see `Coordinator`.

    def bind(self, filesystem: FileSystem, root: str) -> None:
        if self._link is not None:
            raise ConfigError("this RankCoordinator has an engine already; make one for each engine")
        self._fs, self._root = filesystem, root
        self._cleaner = DaemonExecutor("async-ckpt-ranks-cleanup", 1)
        channel = self._channel or ("node-local" if self.info.num_nodes > 1 else f"{crc32(root.encode()):08x}")
        store = self._store
        prefix = f"async_ckpt/{self._run_id}/{channel}/"
        self._link = StoreLink(lambda: private_connection(store), prefix, self.info)
        self._joining = Joining(self._link, filesystem)

    def begin(self, destination: Destination, overwrite: str) -> RankStaging:
        opened = RankStaging(destination, overwrite)
        try:
            destination.prepare(self._fs, leads=self.leads, overwrite=overwrite)
            if self.leads:
                transaction.begin(self._fs, opened)
        except Exception as error:
            self._joining.tell_begin_failed(destination.tag, error)
            raise
        self._joining.begin(opened)
        return opened

    def admit(self, opened: Staging, path: str, manifest_bytes: int) -> Future[str]:
        assert isinstance(opened, RankStaging)
        staging, folder = opened, Future[str]()

        def ask() -> Step:
            yield from rank_protocol.admit(self.info, staging.attempt.result(), path, manifest_bytes)

        def answered(done: Future[Any]) -> None:
            error = done.exception()
            if error is None:
                folder.set_result(staging.path)
            else:
                folder.set_exception(staging.ended_by(error, self.rank))

        self.talk.submit(ask(), after=staging.attempt).add_done_callback(answered)
        return folder

    def publish(self, opened: Staging, part: Manifest) -> None:
        assert isinstance(opened, RankStaging)
        attempt = self._learn(opened, opened.attempt)
        part = replace(part, files=(*part.files, *opened.destination.take_in(self._fs, opened.path)))
        digest = write_part(self._fs, opened, self.rank, part)
        said = f"{digest} {opened.destination.vote}".rstrip()
        self._learn(opened, rank_protocol.report(self.info, attempt, said), reported=True)
        if self.rank == 0:
            self._publish_as_first(opened, attempt, part)
            return
        if self.leads:
            self._publish_own_node(opened, attempt, part)
        opened.outcome = self._learn(opened, rank_protocol.await_result(self.info, attempt), reported=True)
        self.talk.later(rank_protocol.settle(self.info, attempt))

    def abort(self, opened: Staging, error: BaseException) -> None:
        assert isinstance(opened, RankStaging)
        attempt: int | None = None
        if self.rank == 0 or opened.attempt.done():
            try:
                attempt = self._learn(opened, opened.attempt)
                if opened.outcome is None:
                    blamed = error.rank if isinstance(error, RankFailedError) else None
                    step = rank_protocol.fail(self.info, attempt, cause_of(error), blamed=blamed)
                    opened.outcome = self._learn(opened, step)
            except CommitError as failure:
                cause = failure.__cause__
                attempt = cause.attempt if isinstance(cause, AttemptFailed) else attempt
                if not isinstance(cause, AttemptFailed):
                    told = "the other ranks could not be told that %r was given up: %s"
                    report(logging.WARNING, told, opened.tag, failure)
        else:
            self._joining.tell_once_joined(opened.attempt, error)
        self._leave(opened, attempt)

    def sweep(self) -> None:
        if self.leads:
            transaction.sweep(self._fs, self._root)

    def close(self) -> None:
        if self._link is not None:
            self._link.close(self._linger_s)
            self._cleaner.shutdown(wait=False)
            self._cleaner.join(self._linger_s)

    # Resuming.

    def latest_on_all(self, verify: str = "full") -> str | None:
        """The newest checkpoint that every node has and that verifies on every node; the same answer on all ranks.
        None: there is none.

        All ranks call it, on a coordinator whose engine exists; each node's lowest rank reads, the others wait. Blocks
        for the reading and for the slowest rank. It needs no process group. With one shared root, rank 0 alone reads.

        Raises:
            RankFailedError: a node did not answer within `timeout_s`, or could not read its root; on all ranks.
        """
        return self.newest_on_all(verify)[0]

    def newest_on_all(self, verify: str, mirrors: Sequence[Catalog] = ()) -> tuple[str | None, Catalog | None]:
        """As `latest_on_all`, where a node also has what its `mirrors` have; and, on its lowest rank, where it is."""
        exchange = self._exchange("latest_on_all")
        here = Catalog(self._root, self._fs)
        return latest_on_all(self.info, [here, *mirrors], exchange, verify)

    def load_once(self, path: StrPath, into: Any, *, per_node: bool | None = None, **how: Any) -> Any:
        """Fill the tensors of `into` on all ranks from "<tag>/file.pt", which one rank reads and verifies. All ranks
        call it, with states of the same names and shapes. Blocks for the slowest; see `ranks/load_once.py`.

        For a checkpoint that is missing or damaged the next older one is read, with a warning: see `Restored.tag`. With
        `per_node` one rank per node reads (as by default where each has its own root), else rank 0 for all. `how`:
        `strict`, `select`, `rename`, and the result, as in `async_ckpt.load_into`.

        Raises:
            ConfigError: ``torch.distributed`` is not initialised. RankFailedError: names a rank that failed or did not
                answer within twice `timeout_s`. Otherwise as `load_into`; on all ranks alike.
        """
        from .load_once import load_once

        exchange = self._exchange("load_once")
        return load_once(self.info, Catalog(self._root, self._fs), exchange, path, into, per_node, how)

    def _exchange(self, name: str) -> Exchange:
        return self._exchanges.setdefault(name, Exchange(self.talk, name, self.info.timeout_s))

    # Committing.

    def _learn(self, opened: RankStaging, step: Step | Future[Any], *, reported: bool = False) -> Any:
        """The result of a step of `opened`; where the attempt is over, that is kept there and raised. Blocks."""
        try:
            return (step if isinstance(step, Future) else self.talk.submit(step)).result()
        except (AttemptFailed, LinkLostError) as failure:
            raise opened.ended_by(failure, self.rank, reported=reported) from failure

    def _publish_as_first(self, opened: RankStaging, attempt: int, part: Manifest) -> None:
        info = self.info
        digests = self._learn(opened, rank_protocol.gather(info, attempt))
        opened.destination.check_votes([said.partition(" ")[2] for said in digests])
        files = merge_parts(self._fs, opened, info.group, digests)
        self._learn(opened, rank_protocol.decide(info, attempt, part.created_unix_ns))
        try:
            self._rename(opened, replace(part, files=files))
        except BaseException as error:
            committed = error.committed if isinstance(error, CommitError) else False
            self._tell_outcome(opened, attempt, CommitOutcome(False, 0, cause_of(error), 0, committed))
            raise
        self._tell_outcome(opened, attempt, CommitOutcome(True, None, "", 0, True))
        self.talk.later(rank_protocol.retire(info, attempt))

    def _tell_outcome(self, opened: RankStaging, attempt: int, outcome: CommitOutcome) -> None:
        opened.outcome = outcome
        try:
            of_all = self._learn(opened, rank_protocol.conclude(self.info, attempt, outcome), reported=True)
        except CommitError as lost:
            if self.info.num_nodes > 1:
                raise
            # The rename has been done, or not, already: the others find out by listing the root.
            told = "the other ranks could not be told what became of checkpoint %r: %s"
            report(logging.ERROR, told, opened.tag, lost)
            return
        if outcome.ok and not of_all.ok:
            opened.outcome = of_all
            raise of_all.error(opened.destination.root, opened.tag)

    def _publish_own_node(self, opened: RankStaging, attempt: int, part: Manifest) -> None:
        info = self.info
        decided = self._learn(opened, rank_protocol.await_decision(info, attempt), reported=True)
        error = ""
        try:
            digests = self._learn(opened, rank_protocol.parts(info, attempt))
            files = merge_parts(self._fs, opened, info.group, digests)
            self._rename(opened, replace(part, files=files, created_unix_ns=decided.created_unix_ns))
        except (CheckpointError, OSError) as failure:
            error = cause_of(failure)
        self._learn(opened, rank_protocol.renamed(info, attempt, error), reported=True)

    def _rename(self, opened: RankStaging, manifest: Manifest) -> None:
        transaction.publish(self._fs, opened, replace(manifest, writer=self.info.marks))
        opened.destination.published(self._fs)

    # Leaving.

    def _leave(self, opened: RankStaging, attempt: int | None) -> None:
        """Remove what is staged once no rank writes there any more, and tidy the store up."""
        is_own = opened.identity is not None
        if not is_own or attempt is None:
            if attempt is not None:
                self.talk.later(rank_protocol.settle(self.info, attempt))
            if is_own:
                transaction.abort(self._fs, opened)
            return
        quit_by_others = self.talk.submit(rank_protocol.await_quit(self.info, attempt))

        def remove() -> None:
            # Also where the link was lost: an unremoved directory would hold its space until this process ends.
            with contextlib.suppress(LinkLostError):
                quit_by_others.result()
            try:
                transaction.abort(self._fs, opened)
            except CheckpointError as error:
                report(logging.WARNING, "a staging directory could not be removed: %s", error)
            tidy_up = rank_protocol.retire if self.rank == 0 else rank_protocol.settle
            self.talk.later(tidy_up(self.info, attempt))

        removed = self._cleaner.submit(remove)
        self.talk.track(removed)
        concurrent.futures.wait([removed], timeout=min(_PROMPT_REMOVAL_S, self.info.timeout_s / 4))

    @property
    def talk(self) -> StoreLink:
        """Asks the other ranks anything, over the connection of the commits; after `bind`."""
        if self._link is None:
            raise ConfigError("this RankCoordinator has no engine: give it to one, as `coordinator`, first")
        return self._link
