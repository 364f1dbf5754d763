"""The asyncio writer pool: one daemon thread with one event loop puts staging chunks on disk.

Guarantees:
- `open_file`, `FileWrite.submit`, `submit_copy` and `run` never block; what they start always resolves.
- At most `num_writers` writes are in flight over all files; fsync of a file starts as soon as its data is written.
- When the loop thread dies, is stopped from outside or loses its executors, every outstanding future fails at once
  with an error of our tree that holds the cause, and every later call raises it. Memory is still given back only when
  no thread uses it.
- Nothing here keeps the interpreter from exiting; whoever wants the writes finished calls `close`, which is bounded.
- A forked child is refused by every call and touches nothing of its parent's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, Literal, TypeVar

from .errors import BackpressureTimeout, TransactionStateError, WriteError
from .executor import BACKGROUND_NICENESS, DaemonExecutor, check_process
from .filesystem import FileSystem
from .filewrite import Chunk, FileWrite, WrittenFile
from .iomode import ModeChooser
from .lane import Lane, Outcome, Slots
from .metrics import Span
from .pipeline import Pipeline

__all__ = ["Chunk", "FileWrite", "WriterPool", "WrittenFile"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Threads beyond the writers, so that opening, syncing and closing never wait behind long writes.
_NUM_SPARE_THREADS = 2
_NUM_SEALERS = 2
_NUM_DRAIN_TRIES = 8

_pools: weakref.WeakSet[WriterPool] = weakref.WeakSet()
_inherited: list[WriterPool] = []


def _keep_in_child() -> None:
    # Collecting a parent's loop in the child would close or unregister descriptors of an epoll set that both share.
    _inherited.extend(_pools)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_in_child)


class WriterPool:
    """Writes files from chunks. Any thread but the pool's own; only `close` blocks.

    Args:
        num_writers: writes in flight at once over all files; "auto" is up to 16 and learned from the disk.
        io_mode: past the page cache, through it, or as `iomode.ModeChooser` learns.
        on_span: told about every crc, write, fsync, open and close, on the thread that did it; must be quick.
        name: prefix of the thread names.
    """

    def __init__(
        self,
        filesystem: FileSystem,
        *,
        num_writers: int | Literal["auto"] = "auto",
        io_mode: Literal["auto", "direct", "buffered"] = "auto",
        on_span: Callable[[Span], None] | None = None,
        name: str = "async-ckpt",
    ) -> None:
        self._pid = os.getpid()
        self._on_span = on_span
        self._lock = threading.Lock()
        self._files: dict[Pipeline, None] = {}
        self._runs: dict[Outcome[Any], asyncio.Task[None] | None] = {}
        self._death: BaseException | None = None
        self._death_callbacks: list[Callable[[BaseException], None]] = []
        self._fatal: BaseException | None = None
        self._is_closing = False
        self._is_stopping = False
        self._num_queued = 0
        self._max_queued = 0
        # Sizes are decided before any thread starts: a bad value must not leave threads behind.
        self._chooser = ModeChooser(io_mode, num_writers)
        self._filesystem = filesystem
        self._slots = Slots(self._chooser.max_writers)
        # Not the policy's loop: others schedule differently and may refuse to be stopped from outside.
        self._loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop()
        self._loop.set_exception_handler(self._on_loop_exception)
        self._writers = DaemonExecutor(f"{name}-write", self._chooser.max_writers + _NUM_SPARE_THREADS, niceness=BACKGROUND_NICENESS)
        self._sealers = DaemonExecutor(f"{name}-crc", _NUM_SEALERS, niceness=BACKGROUND_NICENESS)
        self._copier = DaemonExecutor(f"{name}-copy", 1)
        self._executors = (self._writers, self._sealers, self._copier)
        self._thread = threading.Thread(target=self._run_loop, name=f"{name}-loop", daemon=True)
        _pools.add(self)
        self._thread.start()

    # The caller's side.

    def open_file(
        self,
        location: str | Future[str],
        *,
        size_bytes: int,
        seal: Callable[[int, memoryview], int],
        make_parents: bool = False,
        tag: str = "",
    ) -> FileWrite:
        """Start a file of `size_bytes` bytes at `location`, or where that future will say. Never blocks.

        Args:
            seal: called once per chunk, strictly in file order, with (offset, its bytes) on a CRC thread; may patch the
                bytes; returns the CRC32 of the extent as it is to be written.
            make_parents: make missing parent directories.
            tag: goes into spans.

        Raises:
            TransactionStateError: closed, or in a forked child.
            WriteError: the pool has died; holds the cause.
        """
        self._check()
        file = FileWrite(location, size_bytes, on_change=lambda: self._call(pipeline.notice), count=self._count)
        pipeline = Pipeline(
            file,
            Lane(self._writers, self._tell if self._on_span is not None else None, tag),
            filesystem=self._filesystem,
            loop=self._loop,
            slots=self._slots,
            sealers=self._sealers,
            seal=seal,
            make_parents=make_parents,
            arm=self._chooser.choose(size_bytes),
            on_end=self._file_ended,
        )
        with self._lock:
            self._check_open()
            for other in self._files:
                other.disk_time.had_company = pipeline.disk_time.had_company = True
            self._files[pipeline] = None
            self._loop.call_soon_threadsafe(pipeline.start)
        return file

    def submit_copy(self, fn: Callable[[], T]) -> Future[T]:
        """Run `fn` on the one copy thread, first in first out. Never blocks; raises as `open_file` does."""
        self._check()
        return self._copier.submit(fn)

    def run(self, coro: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop; blocking in it stops all writing. Never blocks; raises as `open_file` does."""
        outcome: Outcome[T] = Outcome()
        try:
            self._check()
            with self._lock:
                self._check_open()
                self._runs[outcome] = None
                self._loop.call_soon_threadsafe(self._start, coro, outcome)
        except BaseException:
            coro.close()
            raise
        return outcome

    def on_death(self, callback: Callable[[BaseException], None]) -> None:
        """Call `callback(error)` once when the pool dies (now, if it has); on the dying thread, must not raise or block."""
        with self._lock:
            death = self._death
            if death is None:
                self._death_callbacks.append(callback)
        if death is not None:
            callback(death)

    @property
    def num_queued(self) -> int:
        """Chunks submitted and not yet released."""
        return self._num_queued

    @property
    def max_queue_chunks(self) -> int:
        """The most chunks that were ever queued."""
        return self._max_queued

    def waiting_for(self) -> str:
        """What the oldest unfinished file waits for, in words; never blocks."""
        check_process(self._pid, "this writer pool")
        with self._lock:
            files, num_runs = list(self._files), len(self._runs)
        if not files:
            return f"{num_runs} commit(s) or clean-up(s)" if num_runs else "nothing"
        more = f", and {len(files) - 1} more file(s)" if len(files) > 1 else ""
        return files[0].waiting_for() + more

    def close(self, timeout_s: float | None = None) -> None:
        """Wait for every file and coroutine, then stop the threads; may be called again. Files that lack chunks fail.

        Raises:
            BackpressureTimeout: not done within `timeout_s` seconds; says what it waits for. Writes go on in the
                background, and the process may exit.
            TransactionStateError: called on the pool's own thread or in a forked child.
        """
        check_process(self._pid, "this writer pool")
        if threading.current_thread() is self._thread:
            raise TransactionStateError("the writer pool cannot be closed from its own thread: it would wait for itself")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._lock:
            self._is_closing = True
            incomplete = [pipeline.file for pipeline in self._files if pipeline.file.lacks_chunks]
            outstanding = [*(pipeline.file.done for pipeline in self._files), *self._runs]
        for file in incomplete:
            file.abort(TransactionStateError(f"the writer pool was closed before all of {file.path} was submitted"))
        if wait(outstanding, _left(deadline)).not_done:
            raise BackpressureTimeout(f"the writer did not end within {timeout_s} s; it waits for {self.waiting_for()}")
        with self._lock:
            self._is_stopping = True
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_left(deadline))
        if self._thread.is_alive():
            raise BackpressureTimeout(f"the writer's thread did not end within {timeout_s} s; it waits for {self.waiting_for()}")
        for executor in self._executors:
            executor.shutdown(wait=False)
        if not all(executor.join(_left(deadline)) for executor in self._executors):
            raise BackpressureTimeout(f"the writer's threads did not end within {timeout_s} s: one is stuck in the system")

    # What files report.

    def _call(self, callback: Callable[[], object]) -> None:
        # A closed loop means that the pool has ended, and has settled or abandoned every file.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def _count(self, change: int) -> None:
        with self._lock:
            self._num_queued += change
            self._max_queued = max(self._max_queued, self._num_queued)

    def _file_ended(self, pipeline: Pipeline) -> None:
        if pipeline.disk_time.busy_s:
            self._chooser.observe(pipeline.arm, pipeline.file.size_bytes, pipeline.disk_time.busy_s)
        with self._lock:
            self._files.pop(pipeline, None)

    # The loop thread.

    def _run_loop(self) -> None:
        try:
            self._loop.run_forever()
        except BaseException as error:  # noqa: BLE001 -- whatever it is, every waiter gets it as the cause
            self._fatal = error
        with self._lock:
            is_regular = self._is_stopping and self._fatal is None
        if not is_regular:
            self._die(self._fatal)
            self._drain()
        self._loop.close()

    def _die(self, cause: BaseException | None) -> None:
        reason = repr(cause) if cause is not None else "its event loop was stopped from outside"
        death = WriteError(
            f"the checkpoint writer died ({reason}); what it had not synced is not committed, older checkpoints are untouched"
        )
        death.__cause__ = cause
        with self._lock:
            if self._death is None:
                self._death = death
            files, runs, callbacks = list(self._files), list(self._runs), self._death_callbacks
            self._death_callbacks = []
        logger.error("%s", death, exc_info=cause)
        for file in files:
            file.die(death)
        for outcome in runs:
            outcome.resolve(None, death)
        for callback in callbacks:
            callback(death)

    def _drain(self) -> None:
        """Let every task end, so that memory and descriptors are given back; the loop may be stopped under us again."""
        for _ in range(_NUM_DRAIN_TRIES):
            try:
                self._loop.run_until_complete(self._end_tasks())
                return
            except BaseException as error:  # noqa: BLE001 -- the death has been told; only the clean-up is at stake
                logger.info("the dying writer's loop was interrupted again: %r", error)
        for file in list(self._files):
            file.abandon()

    async def _end_tasks(self) -> None:
        cancelled: set[asyncio.Task[None]] = set()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            # Only coroutines of `run`: files have been told, and wait for their threads by themselves.
            for task in [task for task in self._runs.values() if task is not None and task not in cancelled]:
                cancelled.add(task)
                task.cancel()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    def _start(self, coro: Coroutine[Any, Any, T], outcome: Outcome[T]) -> None:
        task = self._runs[outcome] = self._loop.create_task(self._serve(coro, outcome))
        task.add_done_callback(lambda _: self._run_ended(coro, outcome))

    async def _serve(self, coro: Coroutine[Any, Any, T], outcome: Outcome[T]) -> None:
        try:
            outcome.resolve(await coro, None)
        except asyncio.CancelledError as cancelled:
            outcome.resolve(None, self._cancelled_error(cancelled))
        except BaseException as error:
            outcome.resolve(None, error)
            # As asyncio itself does: KeyboardInterrupt and SystemExit end the loop, and everybody is told.
            if not isinstance(error, Exception):
                raise

    def _run_ended(self, coro: Coroutine[Any, Any, T], outcome: Outcome[T]) -> None:
        # Cancelled before its first step, neither of the two was reached.
        coro.close()
        outcome.resolve(None, self._cancelled_error(None))
        with self._lock:
            self._runs.pop(outcome, None)

    def _cancelled_error(self, cause: BaseException | None) -> BaseException:
        if self._death is not None:
            return self._death
        error = WriteError("a task of the checkpoint writer was cancelled; this checkpoint is not committed")
        error.__cause__ = cause
        return error

    def _on_loop_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "handle" not in context:
            loop.default_exception_handler(context)
            return
        # A callback that raised has left some file waiting for ever: better dead, and told, than hanging.
        self._fatal = context.get("exception")
        loop.stop()

    # Checks.

    def _check(self) -> None:
        check_process(self._pid, "this writer pool")
        for executor in self._executors:
            if executor.refusal is not None and not self._is_closing:
                raise WriteError(f"the checkpoint writer is dead: {executor.refusal}") from executor.refusal

    def _check_open(self) -> None:
        if self._death is not None:
            raise self._death
        if self._is_closing:
            raise TransactionStateError("the writer pool is closed")

    def _tell(self, span: Span) -> None:
        on_span = self._on_span
        if on_span is None:
            return
        try:
            on_span(span)
        except Exception:
            # An observer never harms a checkpoint.
            self._on_span = None
            logger.warning("an observer of the writer raised and is left out from now on", exc_info=True)


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
