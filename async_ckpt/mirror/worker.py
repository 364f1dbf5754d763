"""One mirror's work: one checkpoint after the other, on the mirrors' event loop.

What is to be done follows from the disk: what is committed there and not noted as mirrored. So a restart needs no
    queue,
and what failed is tried again with the next commit. Checkpoints of this run come first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import CheckpointError, CheckpointNotFoundError, CorruptCheckpointError, MirrorError, report
from ..format.manifest import Manifest
from ..metrics import MirrorMetrics, Span
from ..reading.catalog import Catalog
from ..storage.filesystem import FileSystem
from .config import Mirror
from .context import Agreement, UploadContext, abandon
from .open_store import open_store
from .parts import Pace
from .pending import PendingMirror
from .probe import probe
from .remote import remote_catalog
from .remote_manifest import delete_doomed
from .remote_retention import remove_remote
from .state import States
from .store import ConditionFailed, PassingFailure
from .turns import UploadTurns
from .upload import Upload

T = TypeVar("T")
_PAUSE_S, _MAX_PAUSE_S = 0.2, 15.0


@dataclass(frozen=True)
class WorkerHooks:
    """What a worker tells, on its own threads. None of them may raise."""

    on_span: Callable[[Span], object] = lambda span: None
    on_ended: Callable[[MirrorMetrics, BaseException | None], object] = lambda metrics, error: None
    retain: Callable[[Mirror, Catalog, Callable[[Manifest], object]], object] = lambda mirror, catalog, remove: None
    """Let the mirror's retention work on this catalog, by this removal; may block.
    Raises ConfigError (the policy cannot judge), MirrorError."""
    on_mirrored: Callable[[], object] = lambda: None
    """A checkpoint is in the mirror; may block."""


class Worker:
    """Made on any thread; `run` and `wake` belong to the loop."""

    def __init__(
        self,
        mirror: Mirror,
        *,
        filesystem: FileSystem,
        root: str,
        agreement: Agreement,
        may_overwrite: bool,
        executor: Executor,
        hooks: WorkerHooks,
        turns: UploadTurns,
        with_backlog: bool,
    ) -> None:
        self.mirror = mirror
        self.states = States(filesystem, root, mirror.url, agreement.rank or 0)
        self.ready: Future[None] = Future()
        """Resolves when the store has been tried; with what is wrong with it, if something is."""
        self._fs = filesystem
        self._catalog = Catalog(root, filesystem)
        self._agreement = agreement
        self._may_overwrite = may_overwrite
        self._executor = executor
        self._hooks = hooks
        self._turns = turns
        self._with_backlog = with_backlog
        self._context: UploadContext | None = None
        self._todo: OrderedDict[str, list[PendingMirror]] = OrderedDict()
        self._backlog: list[str] = []
        self._given_up: set[str] = set()
        self._wakened = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_finishing = self._is_busy = False

    def wake(self, pending: PendingMirror | None, error: BaseException | None = None) -> None:
        """A commit has ended: mirror it, or learn that there is nothing to mirror."""
        if pending is not None and error is not None:
            pending.mirror_ended(self.mirror.url, error)
        elif pending is not None:
            self._todo.setdefault(pending.tag, []).append(pending)
        self._wakened.set()

    def finish(self) -> None:
        """Stop after what is being done for this run; what is left of earlier runs waits for the next start."""
        self._is_finishing = True
        self._wakened.set()
        if not self._is_busy:
            self.cancel()

    def cancel(self) -> None:
        """Stop at the next await; what is half sent is gone on with at the next start."""
        if self._task is not None:
            self._task.cancel()

    @property
    def is_unconditional(self) -> bool:
        """Whether the store was found to ignore conditions."""
        return self._context is not None and not self._context.abilities.conditional

    async def run(self) -> None:
        """Mirror until cancelled."""
        self._task = asyncio.current_task()
        try:
            while not self._is_finishing:
                self._wakened.clear()
                if await self._prepare():
                    await self._work()
                await self._wakened.wait()
        finally:
            if not self.ready.done():
                self.ready.set_result(None)

    # Before the first upload.

    async def _prepare(self) -> bool:
        """Try the store, with the mirror's patience; where that ends, those who wait get the reason."""
        give_up_s, pause_s = time.monotonic() + self.mirror.retry_timeout_s, _PAUSE_S
        while self._context is None:
            try:
                context = await self._in_thread(self._connect)
                await self._in_thread(self._recover, context)
                self._context = context
            except CheckpointError as error:
                if not self.ready.done():
                    self.ready.set_exception(error)
                if isinstance(error, PassingFailure) and time.monotonic() < give_up_s and not self._is_finishing:
                    await asyncio.sleep(pause_s)
                    pause_s = min(_MAX_PAUSE_S, 2 * pause_s)
                    continue
                self._fail_all(error)
                return False
        if not self.ready.done():
            self.ready.set_result(None)
        return True

    def _fail_all(self, error: CheckpointError) -> None:
        while self._todo:
            _, pendings = self._todo.popitem(last=False)
            for pending in pendings:
                self._tell(pending.metrics_of(self.mirror.url), error)
                pending.mirror_ended(self.mirror.url, error)

    def _connect(self) -> UploadContext:
        mirror = self.mirror
        abilities = probe(open_store(mirror, executor=self._executor, filesystem=self._fs, quick=True), self._executor)
        if not abilities.conditional:
            ignored = "the store ignores conditions (If-None-Match): two writers could overwrite each other's manifests"
            if self._agreement.rank is not None:
                raise MirrorError(
                    f"{ignored}, and this job has several ranks: nothing is mirrored there", url=mirror.url
                )
            report(logging.WARNING, "%s. See to it that only this process writes to %s", ignored, mirror.url)
        return UploadContext(
            mirror=mirror,
            store=open_store(mirror, executor=self._executor, filesystem=self._fs),
            abilities=abilities,
            states=self.states,
            catalog=self._catalog,
            executor=self._executor,
            pace=Pace(mirror.max_bytes_per_s),
            turns=self._turns,
            agreement=self._agreement,
            may_overwrite=self._may_overwrite,
            on_span=self._hooks.on_span,
        )

    def _recover(self, context: UploadContext) -> None:
        """End what earlier processes left: attempts whose checkpoint is gone, deletions that were cut short; note
        what is missing."""
        found = [entry for entry in self._catalog.entries() if entry.manifest is not None and entry.copied_from is None]
        local = {entry.tag: entry.manifest for entry in found if entry.manifest is not None}
        for state in self.states.all():
            manifest = local.get(state.tag)
            delete_doomed(context.store, self.states, state.tag)
            if manifest is None and state.mirrored:
                self.states.forget(state.tag)
            elif not state.mirrored and (manifest is None or manifest.created_unix_ns != state.created_unix_ns):
                abandon(context, state)
        if self._with_backlog:
            self._backlog = [
                tag for tag, manifest in local.items() if not self.states.is_mirrored(tag, manifest.created_unix_ns)
            ]

    # Uploads.

    async def _work(self) -> None:
        """All that is to be done now; what fails waits for the next call."""
        failed: list[str] = []
        while (self._todo or self._backlog) and not self._is_finishing:
            self._is_busy = bool(self._todo)
            if self._todo:
                tag, pendings = self._todo.popitem(last=False)
                self._given_up.discard(tag)
            else:
                tag, pendings = self._backlog.pop(0), []
                if tag in self._given_up:
                    continue
            try:
                error = await self._mirror(tag, pendings)
            except asyncio.CancelledError:
                self._backlog.append(tag)
                for pending in pendings:
                    pending.mirror_ended(self.mirror.url, _cut_short(tag, self.mirror.url))
                raise
            if error is not None and not isinstance(error, CheckpointNotFoundError):
                if isinstance(error, (ConditionFailed, CorruptCheckpointError)):
                    self._given_up.add(tag)
                elif tag not in failed:
                    failed.append(tag)
        self._is_busy = False
        self._backlog = [*failed, *self._backlog]

    async def _mirror(self, tag: str, pendings: list[PendingMirror]) -> BaseException | None:
        metrics = pendings[0].metrics_of(self.mirror.url) if pendings else MirrorMetrics(tag, self.mirror.url)
        error: BaseException | None = None
        try:
            started_s = time.perf_counter()
            metrics.wait_s = started_s - pendings[0].committed_s if pendings else 0.0
            await Upload(self._connected, tag, metrics).run()
            metrics.upload_s = time.perf_counter() - started_s
        except Exception as failure:  # noqa: BLE001 -- whatever it is, those who wait get it
            error = failure
        self._tell(metrics, error)
        for pending in pendings:
            pending.mirror_ended(self.mirror.url, error)
        if error is None:
            await self._in_thread(self._hooks.on_mirrored)
            if self.mirror.retention is not None and self._agreement.leads:
                await self._retain(tag)
        return error

    async def _retain(self, tag: str) -> None:
        store, catalog = self._connected.store, remote_catalog(self.mirror)
        try:
            await self._in_thread(
                self._hooks.retain, self.mirror, catalog, lambda manifest: remove_remote(store, self.states, manifest)
            )
        except (CheckpointError, OSError) as error:
            # The checkpoint is mirrored: only older ones stay longer than they should.
            self._hooks.on_ended(MirrorMetrics(tag, self.mirror.url), error)

    @property
    def _connected(self) -> UploadContext:
        assert self._context is not None, "_prepare() comes first"
        return self._context

    def _tell(self, metrics: MirrorMetrics, error: BaseException | None) -> None:
        if error is not None:
            report(logging.WARNING, "checkpoint %r was not mirrored to %s: %s", metrics.tag, self.mirror.url, error)
        self._hooks.on_ended(metrics, error)

    async def _in_thread(self, call: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, call, *args)


def _cut_short(tag: str, url: str) -> MirrorError:
    return MirrorError(
        f"the mirroring of {tag!r} was cut short and goes on at the next start; it is whole on disk", url=url
    )
