"""The engine: joins the memory side (plan, snapshot) and the disk side (writer pool, commit).

Guarantees:
- `create`, `save`, `commit` and `close` may be called from any thread; they take turns under one lock, so the content
  of checkpoints never mixes. Within a tag, `save` must return before `commit` is called.
- The first failure of a tag stays: its pending commit, the next `save` or `commit` of the tag, and (unless somebody
  has asked the pending commit for it) the next `create` and the end of the block raise it.
- A forked child cannot use, close or harm its parent's engine (every call looks at the process id before any lock); it
  may make its own.

States of a checkpoint, in order: OPEN, SEALED, DURABLE, COMMITTED, or ABORTED from any of the first three.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal

from ..errors import PathExistsError, UnsafePathError, report
from ..format.metadata import check_metadata
from ..format.names import Root, check_tag
from ..plan.plan import PlannedState, opaque_state
from ..ranks.coordinator import Destination
from ..reading.catalog import Catalog
from ..snapshot.step_exclusion import Turn
from ..threads.executor import check_process, run_aside
from ..threads.locks import Lock
from . import at_exit
from .checkpoint import Checkpoint, given_up
from .commits import Commits
from .config import EngineConfig
from .interface import CheckpointEngine, StrPath, tag_of
from .pending import PendingCommit
from .preemption import PreemptibleEngine
from .restoring import RestoringEngine


class AsyncCheckpointEngine(PreemptibleEngine, RestoringEngine, CheckpointEngine):
    """Saves checkpoints in the background; see the module's guarantees.

    Args:
        config_params: the root directory, a mapping of `EngineConfig` fields, or an `EngineConfig`.
        overrides: `EngineConfig` fields; they win over `config_params`.

    Making an engine makes `root` if it is missing, sweeps what crashed processes left there, and starts to fault in
    staging memory in the background; it blocks for well under a second. Works in synchronous code, in asyncio, and as
    ``with`` or ``async with`` block, whose end waits for every pending commit.

    Raises:
        ConfigError: a bad field or unit, or more staging memory than there is.
        WriteError: the root cannot be made, or is not a directory; or the system has no threads or descriptors left.
            No thread, descriptor or directory is left behind.
    """

    def __init__(
        self, config_params: EngineConfig | Mapping[str, Any] | StrPath | None = None, **overrides: Any
    ) -> None:
        super().__init__(config_params)
        config = EngineConfig.from_params(config_params, **overrides)
        self.name = "async_ckpt"
        self.config = config
        self._paths = Root(config.root)
        self.root = self._paths.path
        self._lock = Lock()
        self._inflight = Commits(config, self.root)
        self._pipeline = self._inflight.pipeline
        self._guard, self._arena = self._pipeline.guard, self._pipeline.arena
        self._catalog = Catalog(self._paths, self._inflight.filesystem)
        self._pipeline.warm()
        at_exit.watch(self, self._inflight)

    # The five calls.

    def create(self, tag: Any) -> None:
        """Open a staging directory for `tag`. Blocks for a few file-system calls.

        Raises:
            TagExistsError: the tag is committed and `overwrite` is "refuse".
            UnsafePathError: the tag is malformed. TransactionStateError: the tag is open already.
            CheckpointError: an earlier commit failed and nobody has asked for its outcome yet (raised once).
            MirrorError: the first call waits until each mirror was tried; one with `on_failure="raise"` cannot be used.
        """
        where = tag if isinstance(tag, Destination) else Destination(self.root, tag_of(tag))
        check_tag(where.tag)
        self._usable()
        if self._inflight.mirrors is not None:
            self._inflight.mirrors.check()
        with self._lock:
            started = time.perf_counter()
            self._usable()
            self._inflight.raise_unacknowledged()
            self._guard.refresh()
            checkpoint = self._inflight.open(where)
            checkpoint.metrics.stall_s += time.perf_counter() - started

    def makedirs(self, path: StrPath, exist_ok: bool = False) -> None:
        """Make a sub-directory of the open checkpoint (parents too), or the root itself. Does not block.

        Raises:
            PathExistsError: it is there already and `exist_ok` is False.
        """
        self._usable()
        with self._lock:
            self._usable()
            if self._paths.is_named_by(path):
                if not exist_ok:
                    raise PathExistsError(f"the checkpoint root {self.root!r} exists already")
                return
            checkpoint, parts = self._locate(path)
            if not checkpoint.add_directory(parts) and not exist_ok:
                raise PathExistsError(
                    f"directory {'/'.join(parts) or '.'!r} exists already in the open checkpoint {checkpoint.tag!r}"
                )

    def save(self, state_dict: Any, path: StrPath, *, format: Literal["torch", "safetensors"] | None = None) -> None:
        """Snapshot `state_dict` as file `path` of the open checkpoint and write it in the background.

        The file holds the state at the moment of this call, however training goes on. Tensors of any shape, dtype and
        layout on the CPU or on the accelerator; everything else must be picklable and is copied now. Blocks for the
        copy of what no guard protects (about one memcpy), and while the staging memory is full (backpressure).

        NumPy arrays and bytes cannot be streamed: torch's pickle writes each byte from 128 on as two, so that the place
        of everything behind them depends on their values. They are encoded in this call, outside the staging memory,
        and kept until they are written: an array at its size to twice that (1.5 times for random bits), MiB by MiB;
        bytes and bytearrays at up to six times theirs while the GIL is held. So wrap large ones (``torch.from_numpy``).
        The first save of a path warns of those above 64 MiB, and of objects that `load` refuses unless
        `weights_only=False`, with their key paths.

        Args:
            path: inside the tag opened last ("model.pt", "sub/optim.pt"), or "<root>/<tag>/model.pt" of any open tag.
            format: of this file; None is the configuration's. "safetensors" takes a flat dict of tensors, whose
                "__metadata__" may be a dict of str for the file's header.

        Raises:
            TransactionStateError: no such tag is open. PathExistsError: the path was saved already.
            UnsupportedStateError: the state cannot be saved, with its key path; the checkpoint stays usable.
            TornSnapshotError: the state changed meanwhile. BackpressureTimeout: the disk did not keep up.
            CheckpointError: the first failure of this tag, if it has failed already.
        """
        started = time.perf_counter()
        self._usable()

        def in_turn(turn: Turn) -> None:
            with self._lock:
                self._usable()
                checkpoint, parts = self._locate(path, carried=isinstance(state_dict, PlannedState))
                if not parts:
                    raise UnsafePathError(
                        f"path {os.fspath(path)!r} names no file inside the checkpoint {checkpoint.tag!r}"
                    )
                checkpoint.check_healthy()
                with self._pipeline.snapshotter.deferring():
                    self._pipeline.save(checkpoint, "/".join(parts), state_dict, started, format, turn)

        # The turn comes before the lock: a closure of the step that is waited for may call this engine.
        self._guard.save(in_turn)

    def save_bytes(self, data: bytes | bytearray | memoryview, path: StrPath) -> None:
        """Write `data` as file `path` of the open checkpoint: what somebody else made (a configuration, a tokenizer).

        As `save`, under a name of any printable characters. The data is held in memory until it is copied.
        """
        self.save(opaque_state(bytes(data)), path)

    def commit(self, tag: Any, metadata: Mapping[str, Any] | None = None) -> PendingCommit:
        """Seal `tag` and make it durable and visible in the background; returns at once.

        Blocks only while `max_pending_commits` earlier ones are unfinished.

        Args:
            metadata: JSON values (e.g. ``{"step": 100, "loss": 2.1}``), kept in the manifest and readable without
                torch.

        Raises:
            TransactionStateError: the tag is not open, or committed already. UnsupportedStateError: metadata is not
                JSON.
            BackpressureTimeout: too many commits are pending; the tag stays open.
        """
        name = check_tag(tag_of(tag))
        checked = check_metadata(metadata or {})
        self._usable()
        with self._lock:
            started = time.perf_counter()
            self._usable()
            checkpoint = self._inflight.require_open(name)
            checkpoint.budget.check_metadata(checked)
            self._inflight.await_slot()
            pending = self._inflight.commit(checkpoint, checked, started)
            self._pipeline.snapshotter.start_now()
        if self._preemption is not None:
            self._preemption.after_commit(pending)
        return pending

    def pending(self) -> list[PendingCommit]:
        """Commits that have not ended yet, oldest first."""
        return self._inflight.unfinished()

    # Snapshots.

    def guard(self, *optimizers: Any) -> None:
        """Make saves lazy: tensors of these optimizers cannot change before their next `step`, which waits for the
        copies.

        Everything else in a state dict is still copied inside `save`. Every other optimizer's `step` waits for the
        copies too. A step of these on another thread and a `save` wait for each other to end. Guarded tensors that are
        changed by other means than steps (``load_state_dict``, `.data`) before they are copied fail that checkpoint
        with `TornSnapshotError`: call `wait_snapshot` first. So too before a graph is captured. A capturable or
        captured optimizer's tensors are saved eagerly: replays call nothing. (Guard it before its step is captured:
        nothing sees the capture otherwise.)
        """
        self._usable()
        with self._lock:
            self._usable()
            for optimizer in optimizers:
                self._pipeline.warm(self._guard.add(optimizer))

    def wait_snapshot(self) -> None:
        """Block until every lazy snapshot has been copied: after it, any tensor may change by any means."""
        self._guard.wait(block=True)

    def prewarm(self, state_bytes: int | None = None, *, states: Mapping[str, Any] | None = None) -> None:
        """Block until a save of this size is a warm one: staging memory is faulted in, and `states` are planned.

        Args:
            state_bytes: None is the size of `states`, or all staging memory without them.
            states: what checkpoints will hold, by path inside the tag (``{"model.pt": model.state_dict()}``). Nothing
                of it is copied or kept; later states of the same structure reuse the plan. Warns as the first `save`
                does.

        Raises:
            UnsupportedStateError: a state cannot be saved, with its key path. UnsafePathError: a path is malformed.
        """
        self._usable()
        with self._lock:
            self._usable()
            named = {"/".join(self._paths.split(path)[1]): state for path, state in (states or {}).items()}
            planned_bytes = self._pipeline.plan_ahead(named)
        self._pipeline.fault_in(planned_bytes if state_bytes is None and states else state_bytes)

    # Leaving.

    def delete(self, tag: Any) -> None:
        """Delete a committed checkpoint, a pending one once it is committed. Blocks. Of several ranks, the one that
        commits does it.

        Raises:
            CheckpointNotFoundError: there is none (any more). UnsafePathError: the tag is malformed.
            WriteError: the disk refused; it is whole under its name, or what is left of it is tried again after later
                commits.
        """
        name = check_tag(tag_of(tag))
        self._usable()
        self._await_commit(name)
        self._inflight.delete(name)

    def abort(self, tag: Any) -> None:
        """Give up an open checkpoint and remove what it staged. Blocks until its writes have ended.

        Called in an ``except`` block, the other ranks of the job learn that exception as the cause.
        """
        name = check_tag(tag_of(tag))
        self._usable()
        with self._lock:
            self._usable()
            self._inflight.abort(name, given_up(f"checkpoint {name!r} was aborted by its owner", sys.exc_info()[1]))

    def close(self) -> None:
        """Wait for every pending commit, give up what was not committed (with a warning), stop all threads.

        Blocks, at most `close_timeout_s`. Calling it again does nothing.

        Raises:
            CheckpointError: the first failure that nobody has asked for. BackpressureTimeout: the disk did not end in
                time.
        """
        self._close(sys.exc_info()[1])

    def _close(self, reason: BaseException | None) -> None:
        """`reason`: the exception that has led here, if there is one."""
        check_process(self._inflight.pid, "this engine")
        if self._inflight.closed:
            self._inflight.stop(self.config.close_timeout_s)
            return
        try:
            if self._preemption is not None:
                self._preemption.leave()
        finally:
            with self._lock:
                self._guard.wait(block=True)
                self._guard.remove()
            self._inflight.close(self._preemption.remaining_s if self._preemption is not None else float("inf"), reason)
        self._inflight.raise_unacknowledged()

    def __enter__(self) -> AsyncCheckpointEngine:
        self._usable()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        if self._preemption is not None:
            self._preemption.leave_with(error)
        try:
            # Given by hand: `__aexit__` runs this on a thread that handles no exception.
            self._close(error)
        except Exception as failure:  # noqa: BLE001
            # The block's own exception is on its way out and must not be replaced.
            told = "while leaving the block with %r, closing the engine failed too: %s"
            report(logging.WARNING, told, error, failure, warning=RuntimeWarning, stacklevel=2)

    async def __aenter__(self) -> AsyncCheckpointEngine:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await run_aside("async-ckpt-close", lambda: self.__exit__(kind, error, trace))

    # Inside.

    def _locate(self, path: StrPath, *, carried: bool = False) -> tuple[Checkpoint, tuple[str, ...]]:
        """The open checkpoint a path belongs to, and its checked components inside the tag; () is the tag itself."""
        tag, parts = self._paths.split(path, carried=carried)
        return (self._inflight.current() if tag is None else self._inflight.require_open(tag)), parts

    def _usable(self) -> None:
        self._inflight.check_usable()
