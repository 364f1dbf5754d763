"""The engine: all that its user calls, and in what order.

Guarantees:
- All methods may be called from any thread; those that change checkpoints take turns under one lock. Within a tag,
  `save` must return before `commit` is called.
- The first failure of a tag stays: its pending commit, the next `save` or `commit` of the tag, and (unless somebody
  has asked the pending commit for it) the next `create` and the end of the block raise it.
- A forked child cannot use, close or harm its parent's engine; it may make its own.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from ..errors import PathExistsError, TransactionStateError, UnsafePathError
from ..format.metadata import check_metadata
from ..format.names import check_tag
from ..plan.plan import PlannedState, opaque_state
from ..reading.catalog import Catalog
from ..reading.load import load_committed, load_committed_into
from ..snapshot.step_exclusion import Turn
from ..storage.staged import Destination
from ..threads.executor import run_aside
from . import closing, pipeline
from .checkpoint import given_up
from .commits import Commits
from .config import ConfigParams, EngineConfig
from .interface import CheckpointEngine, StrPath, tag_of
from .pending import PendingCommit
from .preemption import DEFAULT_DEADLINE_S, Preemption, PreemptionOutcome


class AsyncCheckpointEngine(CheckpointEngine):
    """Saves checkpoints in the background. A ``with`` or ``async with`` block's end waits for all pending commits.

    Making one makes `root` if it is missing, sweeps what crashed processes left there, and starts to fault in staging
    memory in the background; it blocks for well under a second.

    Args:
        config_params: the root directory, a mapping of `EngineConfig` fields, or an `EngineConfig`.
        overrides: `EngineConfig` fields; they win over `config_params`.

    Raises:
        ConfigError: a bad field or unit, or more staging memory than there is.
        WriteError: the root cannot be made or written in; or the system has no threads or descriptors left. No thread,
            descriptor or directory is left behind.
    """

    def __init__(self, config_params: ConfigParams = None, **overrides: Any) -> None:
        self.name = "async_ckpt"
        self.config = EngineConfig.from_params(config_params, **overrides)
        self._commits = Commits(self.config)
        self.root = self._commits.root
        self._pipeline = self._commits.pipeline
        self._preemption: Preemption | None = None
        self._pipeline.warm()
        closing.watch(self, self._commits)

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
        self._commits.check_usable()
        if self._commits.mirrors is not None:
            self._commits.mirrors.check()
        with self._commits.lock:
            self._commits.open(where)

    def makedirs(self, path: StrPath, exist_ok: bool = False) -> None:
        """Make a sub-directory of the open checkpoint (parents too), or the root itself. Does not block.

        Raises PathExistsError: it is there already and `exist_ok` is False."""
        with self._commits.lock:
            self._commits.check_usable()
            if not self._commits.paths.is_named_by(path):
                checkpoint, parts = self._commits.locate(path)
                checkpoint.add_directory(parts, exist_ok=exist_ok)
            elif not exist_ok:
                raise PathExistsError(f"the checkpoint root {self.root!r} exists already")

    def save(
        self,
        state_dict: Any,
        path: StrPath,
        *,
        format: Literal["torch", "safetensors"] | None = None,
        replicated: bool = False,
    ) -> None:
        """Snapshot `state_dict` as file `path` of the open checkpoint and write it in the background.

        The file holds the state at the moment of this call, however training goes on: tensors of any kind on the CPU or
        on the accelerator; everything else must be picklable and is copied now. Blocks for the copy of what no guard
        protects (about one memcpy), and while the staging memory is full (backpressure).

        NumPy arrays and bytes cannot be streamed: they are encoded in this call, outside the staging memory, an array
        at up to twice its size, bytes at up to six times theirs and with the GIL held. Wrap large ones
        (``torch.from_numpy``). The first save of a path warns, with key paths, of those above 64 MiB and of objects
        that `load` refuses unless `weights_only=False`.

        Args:
            path: inside the tag opened last ("model.pt", "sub/optim.pt"), or "<root>/<tag>/model.pt" of any open tag.
            format: of this file; None is the configuration's. "safetensors" takes a flat dict of tensors, whose
                "__metadata__" may be a dict of str for the file's header.
            replicated: all ranks hold this state, and all make this call: each copies and writes its share of the one
                file (without `reuse` and `rewrite`), which is what rank 0 alone would have written. The commit fails,
                and names ranks and key paths, where ranks differ in what is no tensor, or in the tensors that it
                compares: those in one chunk of each share. Rank 0 alone writes on file systems that are not known to
                be coherent; where each node has a root, its first rank does, and nothing is compared.

        Raises:
            TransactionStateError: no such tag is open. PathExistsError: the path was saved already.
            UnsupportedStateError: the state cannot be saved, with its key path; the checkpoint stays usable.
            TornSnapshotError: the state changed meanwhile. BackpressureTimeout: the disk did not keep up.
            CheckpointError: the first failure of this tag, which it has had already.
        """
        started = time.perf_counter()

        def in_turn(turn: Turn | None) -> None:
            with self._commits.lock:
                self._commits.check_usable()
                checkpoint, parts = self._commits.locate(path, carried=isinstance(state_dict, PlannedState))
                if not parts:
                    raise UnsafePathError(f"path {str(path)!r} names no file inside {checkpoint.tag!r}")
                with self._pipeline.snapshotter.deferring():
                    checkpoint.save("/".join(parts), state_dict, started, format, turn, replicated)

        # The turn comes before the lock: a closure of the step that is waited for may call this engine.
        try:
            self._pipeline.guard.save(in_turn)
        finally:
            pipeline.tell(self._pipeline.notes)

    def save_bytes(self, data: bytes | bytearray | memoryview, path: StrPath) -> None:
        """Write `data` as file `path` of the open checkpoint: what somebody else made (a configuration, a tokenizer).

        As `save`, under a name of any printable characters. The data is held in memory until it is copied.
        """
        self.save(opaque_state(bytes(data)), path)

    def commit(self, tag: Any, metadata: Mapping[str, Any] | None = None) -> PendingCommit:
        """Seal `tag` and make it durable and visible in the background; returns at once.

        Blocks only while `max_pending_commits` earlier ones are unfinished. `metadata`: JSON values (e.g.
        ``{"step": 100, "loss": 2.1}``), kept in the manifest and readable without torch.

        Raises:
            TransactionStateError: the tag is not open, or committed already. UnsupportedStateError: metadata is no
                JSON. BackpressureTimeout: too many commits are pending; the tag stays open.
        """
        with self._commits.lock:
            pending = self._commits.commit(check_tag(tag_of(tag)), check_metadata(metadata or {}))
            self._pipeline.snapshotter.start_at()
        if self._preemption is not None:
            self._preemption.after_commit(pending)
        return pending

    def pending(self) -> list[PendingCommit]:
        """Commits that have not ended yet, oldest first."""
        return self._commits.unfinished()

    # Snapshots.

    def guard(self, *optimizers: Any) -> None:
        """Make saves lazy: tensors of these optimizers cannot change before their next `step`, which waits for copies.

        Everything else is still copied inside `save`. Every other optimizer's `step` waits for the copies too. A step
        of these on another thread and a `save` wait for each other to end. Call `wait_snapshot` before guarded tensors
        are changed by other means than steps (``load_state_dict``, `.data`), else that checkpoint fails with
        `TornSnapshotError`; and before a graph is captured. A capturable or captured optimizer's tensors are saved
        eagerly: replays call nothing. (Guard it before its step is captured: else nothing sees the capture.)
        """
        self._commits.check_usable()
        for optimizer in optimizers:
            self._pipeline.warm(self._pipeline.guard.add(optimizer))

    def wait_snapshot(self) -> None:
        """Block until every lazy snapshot has been copied: after it, any tensor may change by any means."""
        self._pipeline.guard.wait(block=True)

    def prewarm(self, state_bytes: int | None = None, *, states: Mapping[str, Any] | None = None) -> None:
        """Block until a save of this size is a warm one: staging memory is faulted in, `states` are planned, and fit.

        Args:
            state_bytes: None is the size of `states`, or all staging memory without them.
            states: what checkpoints will hold, by path inside the tag (``{"model.pt": model.state_dict()}``); nothing
                is copied or kept, later states of the same structure reuse the plan. Warns as the first `save` does.

        Raises:
            UnsupportedStateError: a state cannot be saved, with its key path. UnsafePathError: a path is malformed.
            OutOfSpaceError: there is no room for one checkpoint, or for as many as `retention` will keep.
        """
        with self._commits.lock:
            self._commits.check_usable()
            named = {"/".join(self._commits.paths.split(path)[1]): state for path, state in (states or {}).items()}
            planned_bytes, size_bytes = self._pipeline.plan_ahead(named)
        pipeline.tell(self._pipeline.notes)
        self._commits.house.check_room(size_bytes)
        self._pipeline.fault_in(planned_bytes if state_bytes is None and states else state_bytes)

    # Reading back.

    def load(
        self,
        path: StrPath,
        map_location: Any = None,
        *,
        weights_only: bool | None = None,
        verify: str = "full",
        mmap: bool | None = None,
    ) -> Any:
        """Load the committed file "<tag>/file.pt" (or "<root>/<tag>/file.pt") and check every byte. Blocks.

        A pending commit of that tag is waited for first. For the arguments and errors see `async_ckpt.load`.
        """
        tag, name = self._commits.paths.split_committed(path)
        how: Any = {"map_location": map_location, "weights_only": weights_only, "verify": verify, "mmap": mmap}
        return load_committed(self.catalog_of(tag), tag, name, **how)

    def load_into(
        self,
        state_dict: Any,
        path: StrPath,
        *,
        strict: bool = True,
        verify: str = "full",
        atomic: bool | Literal["auto"] = "auto",
        weights_only: bool | None = None,
        select: str | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> Any:
        """Read a committed file in parallel straight into `state_dict`'s tensors; returns its other leaves. Blocks.

        Lazy snapshots are waited for first. For the arguments and errors see `async_ckpt.load_into`.
        """
        tag, name = self._commits.paths.split_committed(path)
        catalog = self.catalog_of(tag)
        self.wait_snapshot()
        how: Any = {"strict": strict, "verify": verify, "atomic": atomic, "weights_only": weights_only}
        how |= {"select": select, "rename": rename, "lend": self._pipeline.arena.lend}
        return load_committed_into(catalog, tag, name, state_dict, **how)

    def latest(self, verify: str = "full", *, tier: Literal["disk", "any"] = "disk") -> str | None:
        """Newest committed tag that verifies, or None; logs which ones it skipped and why. Blocks for the reading, and
        first for pending commits of other engines in this root (BackpressureTimeout: they do not end). `tier="any"`:
        also of the mirrors, which `load` and `load_into` then read; nodes with roots of their own ask together, and get
        the newest that each of them has."""
        return self._commits.latest(verify, tier)

    def catalog_of(self, tag: str) -> Catalog:
        """What checkpoint `tag` is read from: the disk, or the first mirror that has what the disk lacks. Blocks."""
        return self._commits.catalog_of(tag)

    def tags(self) -> list[str]:
        """Committed tags, oldest first."""
        return self._commits.catalog.tags()

    # Being stopped.

    def on_preemption(
        self,
        signals: Iterable[int] = (signal.SIGTERM,),
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
        save: Callable[[], object] | None = None,
        agree: Callable[[bool], bool] | None = None,
        exit_after: bool = False,
    ) -> None:
        """From now on, one of `signals` marks this engine as preempted; earlier handlers still run.

        At the next safe point (`poll_preemption`, the end of `commit` or the block) `save()` makes a last checkpoint,
        pending commits are waited for until `deadline_s` after the signal, and the outcome is logged. Main thread only;
        once; `close` gives the signals back. For arguments and errors see `preemption.Preemption`; give DataLoaders
        with workers `ignore_preemption`.
        """
        self._commits.check_usable()
        if self._preemption is not None:
            raise TransactionStateError("on_preemption was called already; its signals and hook stay as they are")
        self._preemption = Preemption(
            self.pending, signals=signals, deadline_s=deadline_s, save=save, agree=agree, exit_after=exit_after
        )

    @property
    def preempted(self) -> bool:
        """Whether a preemption signal has come. Never blocks; any thread."""
        return self._preemption is not None and self._preemption.preempted

    def poll_preemption(self) -> bool:
        """A safe point, once per step: handles a preemption (see `on_preemption`); True when training should stop."""
        return self._preemption is not None and self._preemption.poll()

    @property
    def preemption_outcome(self) -> PreemptionOutcome | None:
        """How the preemption ended; None before it was handled."""
        return None if self._preemption is None else self._preemption.outcome

    # Leaving.

    def delete(self, tag: Any) -> None:
        """Delete a committed checkpoint, a pending one once it is committed. Blocks. Of several ranks, the one that
        commits does it. Of a link, the link: what it points to stays.

        Raises:
            CheckpointNotFoundError: there is none (any more). UnsafePathError: the tag is malformed.
            WriteError: the disk refused; it is whole under its name, or its rest is tried again after later commits.
        """
        self._commits.delete(check_tag(tag_of(tag)))

    def abort(self, tag: Any) -> None:
        """Give up an open checkpoint and remove what it staged. Blocks until its writes have ended. Called in an
        ``except`` block, the other ranks of the job learn that exception as the cause."""
        name = check_tag(tag_of(tag))
        with self._commits.lock:
            self._commits.check_usable()
            self._commits.abort(name, given_up(f"checkpoint {name!r} was aborted by its owner", sys.exc_info()[1]))

    def close(self) -> None:
        """Wait for every pending commit, give up what was not committed (with a warning), stop all threads.

        Blocks, at most `close_timeout_s`. Calling it again does nothing.

        Raises:
            CheckpointError: the first failure that nobody has asked for. BackpressureTimeout: it did not end in time.
        """
        closing.close(self._commits, self._preemption, sys.exc_info()[1])

    def __enter__(self) -> AsyncCheckpointEngine:
        self._commits.check_usable()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        closing.leave_block(self._commits, self._preemption, error)

    async def __aenter__(self) -> AsyncCheckpointEngine:
        return self.__enter__()

    async def __aexit__(self, *error: Any) -> None:
        await run_aside("async-ckpt-close", lambda: self.__exit__(*error))
