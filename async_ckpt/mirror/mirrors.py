"""All mirrors of one engine: their thread, what is pending, what failed, and how long leaving waits.

Guarantees:
- Each mirror has a thread, and a process that uploads (see `process`) or, where that cannot be, a few more threads; at
  the lowest priority for processor and disk.
- A `PendingMirror` always resolves. Nothing here harms a commit, and nothing waits longer than it was told to.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import replace

from ..errors import MirrorError, TransactionStateError, report
from ..metrics import MirrorMetrics
from ..storage.filesystem import FileSystem
from ..threads.executor import DaemonExecutor, lower_priority
from ..threads.locks import Lock
from ..threads.outcome import wait_all
from .config import Mirror
from .context import Agreement, Alone, MirrorContext, MirrorHooks
from .pending import PendingMirror
from .process import Uploader
from .worker import Worker

_STOP_S = 1.0
_CHECK_S = 30.0


class Mirrors:
    """Calls come from the engine, on any thread. Making it starts threads and reads the states; it does not connect
    before that.

    Args:
        agreement: with the other ranks of the job; None: there are none.
        may_overwrite: replace older checkpoints of other runs that have the same tag.
        uploaders_per_node: how many processes of this node upload at once; None: all.
        with_backlog: also mirror what is on disk already and not mirrored, behind what is asked for.

    Raises:
        ConfigError: a mirror's library is not installed (from `check`). WriteError: the states cannot be read, or no
            thread is left.
    """

    def __init__(
        self,
        mirrors: Sequence[Mirror],
        *,
        filesystem: FileSystem,
        root: str,
        agreement: Agreement | None = None,
        may_overwrite: bool = False,
        uploaders_per_node: int | None = None,
        with_backlog: bool = True,
        hooks: MirrorHooks | None = None,
    ) -> None:
        self.mirrors = tuple(mirrors)
        self._hooks = hooks or MirrorHooks()
        self._lock = Lock()
        self._pending: list[PendingMirror] = []
        self._failures: dict[tuple[str, str], tuple[PendingMirror | None, BaseException]] = {}
        """The last one of each mirror and tag that nobody was told of."""
        self._death: BaseException | None = None
        """What has ended the thread of a mirror."""
        self._is_checked = self._is_closed = self._has_ended = False
        self._workers = [
            Worker(
                MirrorContext(
                    mirror,
                    filesystem,
                    root,
                    may_overwrite,
                    uploaders_per_node,
                    agreement or Alone(),
                    replace(self._hooks, on_ended=functools.partial(self._worker_ended, mirror)),
                ),
                with_backlog=with_backlog,
            )
            for mirror in self.mirrors
        ]
        self._executor = DaemonExecutor("async-ckpt-mirror", len(self.mirrors), on_start=lower_priority)
        try:
            for worker in self._workers:
                self._executor.submit(self._run, worker)
        except BaseException:
            for worker in self._workers:
                worker.uploader.stop()
            self._executor.shutdown()
            raise

    # The engine's calls.

    def check(self) -> None:
        """The first call waits until every store has been tried, and says what is wrong with them; later ones do
        nothing. Raises CheckpointError: a store cannot be used, and its mirror says `on_failure="raise"`. Otherwise
        that is a warning."""
        if self._is_checked:
            return
        self._is_checked = True
        deadline = time.monotonic() + _CHECK_S
        for worker in self._workers:
            mirror = worker.context.mirror
            is_tried = worker.ready.wait(deadline - time.monotonic())
            late = MirrorError(f"the store has not answered within {_CHECK_S:g} s", url=mirror.url)
            problem = worker.ready.failure() if is_tried else late
            if problem is not None and mirror.on_failure == "raise":
                raise problem
            if problem is not None:
                told = "checkpoints are not mirrored: %s"
                report(logging.WARNING, told, problem, warning=RuntimeWarning, stacklevel=3)

    def expect(self, tag: str) -> PendingMirror:
        """A commit was called; `committed` follows."""
        pending = PendingMirror(tag, tuple(mirror.url for mirror in self.mirrors), self._hooks.run_callback)
        with self._lock:
            self._pending = [known for known in self._pending if not known.done()]
            self._pending.append(pending)
        return pending

    def committed(self, pending: PendingMirror, error: BaseException | None) -> None:
        """The commit has ended: mirror it, or fail with it."""
        pending.committed_s = time.perf_counter()
        if error is None and (self._is_closed or self._death is not None):
            closed = TransactionStateError(f"the engine was closed before {pending.tag!r} was mirrored")
            error = self._death or closed
        if error is not None:
            pending.fail(error)
            return
        for worker in self._workers:
            worker.mirror(pending)

    def is_mirrored(self, tag: str, created_unix_ns: int) -> bool:
        """Whether every mirror has had this very checkpoint."""
        return all(worker.context.states.is_mirrored(tag, created_unix_ns) for worker in self._workers)

    def raise_unacknowledged(self) -> None:
        """Raise the first failure of a mirror with `on_failure="raise"` that nobody has asked for; each once."""
        while True:
            with self._lock:
                if not self._failures:
                    return
                pending, error = self._failures.pop(next(iter(self._failures)))
            if pending is None or not pending.acknowledged:
                raise error

    def close(self, timeout_s: float) -> None:
        """Wait for what this run has committed, at most `timeout_s`; then stop. Warns of what is left, and where it
        goes on.

        Goes on where an interrupt has cut it short, and does nothing once it is done."""
        if self._has_ended:
            return
        deadline = time.monotonic() + timeout_s
        self._is_closed = True
        with self._lock:
            pending = list(self._pending)
        left = [one.tag for one in pending if not one.wait(deadline - time.monotonic())]
        busy = [worker.ended for worker in self._workers if not left and worker.finish()]
        wait_all(busy, max(_STOP_S, deadline - time.monotonic()))
        # Whoever is inside of a request of this process goes on without us, to its end at most, and changes no state
        # any more.
        for end in (Uploader.stop, Uploader.kill):
            for worker in self._workers:
                end(worker.uploader)
            wait_all((worker.ended for worker in self._workers), _STOP_S)
        self._executor.shutdown(wait=False)
        for one in pending:
            told = f"the engine was closed before {one.tag!r} was mirrored; it goes on at the next start"
            one.fail(MirrorError(told, url=", ".join(mirror.url for mirror in self.mirrors)))
        self._has_ended = True
        if left:
            told = (
                "%d checkpoint(s) are not mirrored yet after %g s of waiting: %s. They are whole on disk, and the next "
                "engine on this root goes on (or `async-ckpt mirror`)"
            )
            tags = ", ".join(map(repr, left[:8]))
            report(logging.WARNING, told, len(left), timeout_s, tags, warning=RuntimeWarning, stacklevel=3)

    @property
    def unconditional(self) -> list[str]:
        """Mirrors that were found to ignore conditions; known after `check`."""
        tried = [(worker.context.mirror.url, worker.context.abilities) for worker in self._workers]
        return [url for url, abilities in tried if abilities is not None and not abilities.conditional]

    # The workers' side.

    def _worker_ended(self, mirror: Mirror, metrics: MirrorMetrics, error: BaseException | None) -> None:
        key = mirror.url, metrics.tag
        with self._lock:
            self._failures.pop(key, None)
            if error is not None and mirror.on_failure == "raise":
                pending = next((one for one in reversed(self._pending) if one.tag == metrics.tag), None)
                self._failures[key] = pending, error
        self._hooks.on_ended(metrics, error)

    def _run(self, worker: Worker) -> None:
        try:
            worker.run()
        except BaseException as error:
            if not self._is_closed:
                self._death = error
                with self._lock:
                    pending = list(self._pending)
                    self._failures["", ""] = None, error
                for one in pending:
                    one.fail(error)
            raise
        finally:
            worker.ended.resolve(None, None)
