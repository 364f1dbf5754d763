"""One mirror's work: one checkpoint after the other, on one thread.

What is to be done follows from the disk: what is committed there and not noted as mirrored. So a restart needs no
queue. What failed is tried again with the next commit, and from time to time: a full disk may wait for it. Checkpoints
of this run come first.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict

from ..errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, MirrorError, report
from ..metrics import MirrorMetrics
from ..threads.outcome import Outcome
from .context import MirrorContext, Stopped
from .objects import delete_doomed, read_manifest, remove_remote
from .pending import PendingMirror
from .process import Uploader
from .remote import open_store, remote_catalog
from .store import ConditionFailed, PassingFailure, probe

_PAUSE_S, _MAX_PAUSE_S = 0.2, 15.0
_MIN_REST_S = 1.0


class Worker:
    """Any thread; only `run` blocks."""

    def __init__(self, context: MirrorContext, *, with_backlog: bool) -> None:
        self.context = context
        self.uploader = Uploader(context)
        self.ready: Outcome[None] = Outcome()
        """Resolves when the store has been tried; to what is wrong with it, if something is."""
        self.ended: Outcome[None] = Outcome()
        """Resolves when `run` has ended."""
        self._url = context.mirror.url
        self._with_backlog = with_backlog
        self._todo: OrderedDict[str, list[PendingMirror]] = OrderedDict()
        self._backlog: list[str] = []
        self._given_up: set[str] = set()
        self._is_woken = self._is_finishing = self._is_busy = False

    def mirror(self, pending: PendingMirror) -> None:
        """A checkpoint is committed."""
        with self.context.changed:
            self._todo.setdefault(pending.tag, []).append(pending)
            self._is_woken = True
            self.context.changed.notify_all()

    def finish(self) -> bool:
        """Stop after what is being done for this run, and say whether something is; what is left of earlier runs waits
        for the next start."""
        with self.context.changed:
            self._is_finishing = self._is_woken = True
            if not self._is_busy:
                self.uploader.stop()
            return self._is_busy

    def run(self) -> None:
        """Mirror until stopped."""
        try:
            while not self._is_finishing:
                self._is_woken = False
                is_all_done = self._prepare() and self._work()
                rest_s = max(_MIN_REST_S, self.context.mirror.retry_timeout_s)
                self.context.wait_for(lambda: self._is_woken, None if is_all_done else rest_s)
        except Stopped:
            pass
        finally:
            self.ready.resolve(None, None)
            self.uploader.close()

    # Before the first upload.

    def _prepare(self) -> bool:
        """Try the store, with the mirror's patience; where that ends, those who wait get the reason."""
        context = self.context
        give_up_s, pause_s = time.monotonic() + context.mirror.retry_timeout_s, _PAUSE_S
        while context.abilities is None:
            try:
                self._connect()
            except Exception as failure:  # noqa: BLE001 -- whatever it is, training goes on
                error = failure
                if not isinstance(failure, CheckpointError):
                    error = MirrorError(f"it cannot be tried: {type(failure).__name__}: {failure}", url=self._url)
                    error.__cause__ = failure
                self.ready.resolve(None, error)
                if isinstance(error, PassingFailure) and time.monotonic() < give_up_s and not self._is_finishing:
                    context.sleep(pause_s)
                    pause_s = min(_MAX_PAUSE_S, 2 * pause_s)
                    continue
                self._fail_all(error)
                return False
        self.ready.resolve(None, None)
        return True

    def _fail_all(self, error: Exception) -> None:
        while (taken := self._take()) is not None:
            for pending in taken[1]:
                self._tell(pending.metrics_of(self._url), error)
                pending.mirror_ended(self._url, error)

    def _connect(self) -> None:
        context = self.context
        context.states.begin(takes_all=self._with_backlog)
        abilities = probe(open_store(context.mirror, context.filesystem, quick=True))
        if not abilities.conditional:
            told = "the store ignores conditions (If-None-Match): two writers could overwrite each other's manifests"
            if context.agreement.rank is not None:
                told += ", and this job has several ranks: nothing is mirrored there"
                raise MirrorError(told, url=self._url)
            report(logging.WARNING, "%s. See to it that only this process writes to %s", told, self._url)
        context.store = open_store(context.mirror, context.filesystem)
        self.uploader.start()
        self._recover()
        context.abilities = abilities

    def _recover(self) -> None:
        """End what earlier processes left: attempts whose checkpoint is gone, deletions that were cut short; note
        what is missing."""
        context, states = self.context, self.context.states
        local = {manifest.tag: manifest for manifest in context.catalog.committed()}
        for state in states.all():
            manifest = local.get(state.tag)
            delete_doomed(context.store, states, state.tag)
            if manifest is None and state.mirrored:
                states.forget(state.tag)
            elif not state.mirrored and (manifest is None or manifest.created_unix_ns != state.created_unix_ns):
                context.abandon(state)
        if self._with_backlog:
            self._backlog = [
                tag for tag, manifest in local.items() if not states.is_mirrored(tag, manifest.created_unix_ns)
            ]

    # Uploads.

    def _take(self) -> tuple[str, list[PendingMirror]] | None:
        """A checkpoint of this run, and who waits for it."""
        with self.context.changed:
            self._is_busy = bool(self._todo)
            return self._todo.popitem(last=False) if self._todo else None

    def _work(self) -> bool:
        """All that is to be done now; what fails waits for the next call. Whether nothing did."""
        failed: list[str] = []
        while not self._is_finishing and ((taken := self._take()) is not None or self._backlog):
            tag, pendings = taken or (self._backlog.pop(0), [])
            if taken is not None:
                self._given_up.discard(tag)
            elif tag in self._given_up:
                continue
            error = self._mirror(tag, pendings)
            if isinstance(error, (ConditionFailed, CorruptCheckpointError)):
                self._given_up.add(tag)
            elif error is not None and not isinstance(error, CheckpointNotFoundError) and tag not in failed:
                failed.append(tag)
        self._backlog = [*failed, *self._backlog]
        return not failed

    def _mirror(self, tag: str, pendings: list[PendingMirror]) -> BaseException | None:
        context = self.context
        metrics = pendings[0].metrics_of(self._url) if pendings else MirrorMetrics(tag, self._url)
        error: BaseException | None = None
        try:
            if not self._with_backlog:
                self._ask_again(tag)
            started_s = time.perf_counter()
            metrics.wait_s = started_s - pendings[0].committed_s if pendings else 0.0
            self.uploader.upload(tag, metrics)
            metrics.upload_s = time.perf_counter() - started_s
        except Stopped:
            told = f"the mirroring of {tag!r} was cut short and goes on at the next start; it is whole on disk"
            for pending in pendings:
                pending.mirror_ended(self._url, MirrorError(told, url=self._url))
            raise
        except Exception as failure:  # noqa: BLE001 -- whatever it is, those who wait get it
            error = failure
        self._tell(metrics, error)
        for pending in pendings:
            pending.mirror_ended(self._url, error)
        if error is None:
            context.hooks.on_mirrored()
            if context.mirror.retention is not None and context.agreement.leads:
                self._retain(tag)
        return error

    def _ask_again(self, tag: str) -> None:
        """By hand, what is noted as mirrored is looked for: somebody may have deleted some of it in the store."""
        store, state = self.context.store, self.context.states.get(tag)
        # Without keys it is retention that has deleted it there.
        if state is not None and state.mirrored and state.keys:
            found = read_manifest(store, tag)
            there = {key: info.e_tag for key in state.done if (info := store.head(key)) is not None}
            if found is None or found.attempt != state.attempt or there != state.done:
                self.context.states.forget(tag)

    def _retain(self, tag: str) -> None:
        context = self.context
        try:
            context.hooks.retain(
                context.mirror,
                remote_catalog(context.mirror, context.store),
                lambda manifest: remove_remote(context.store, context.states, manifest),
            )
        except (CheckpointError, OSError) as error:
            # The checkpoint is mirrored: only older ones stay longer than they should.
            context.hooks.on_ended(MirrorMetrics(tag, self._url), error)

    def _tell(self, metrics: MirrorMetrics, error: BaseException | None) -> None:
        if error is not None:
            report(logging.WARNING, "checkpoint %r was not mirrored to %s: %s", metrics.tag, self._url, error)
        self.context.hooks.on_ended(metrics, error)
