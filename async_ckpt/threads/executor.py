"""Daemon threads behind the standard executor interface.

Guarantees:
- A thread stuck in the kernel never keeps the interpreter from exiting, and work is accepted until `shutdown`, also
  while ``atexit`` hooks run (``ThreadPoolExecutor`` gives neither).
- A submitted job's future always resolves: a dead thread or a shut executor fails what is queued, with the cause.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from ..errors import TransactionStateError
from .locks import TRIES

T = TypeVar("T")

_BACKGROUND_NICENESS = 10
_START_TIMEOUT_S = 20


def check_process(pid: int, what: object) -> None:
    """Refuse to use `what` in a forked child of process `pid`: threads do not survive a fork. Raises
    TransactionStateError: this is another process."""
    if os.getpid() != pid:
        raise TransactionStateError(
            f"{what} belongs to process {pid} and cannot be used in its forked child {os.getpid()}; "
            "nothing of the parent was touched. Make an engine of its own in the child"
        )


def lower_priority(*, also_disk: bool = True) -> None:
    """This thread from now on: processor time after training's, the disk (with `also_disk`) only when nobody else wants
    it. Linux; elsewhere nothing."""
    if sys.platform != "linux":
        return
    thread = threading.get_native_id()
    # Refused in some containers: then it works beside training.
    with contextlib.suppress(OSError):
        niceness = os.getpriority(os.PRIO_PROCESS, thread) + _BACKGROUND_NICENESS
        os.setpriority(os.PRIO_PROCESS, thread, min(19, niceness))
    number = {"x86_64": 251, "aarch64": 30}.get(platform.machine())
    if also_disk and number is not None:
        # ioprio_set(IOPRIO_WHO_PROCESS, thread, IOPRIO_CLASS_IDLE << 13).
        ctypes.CDLL(None, use_errno=True).syscall(number, 1, thread, 3 << 13)


class _Started(threading.Event):
    """What `Thread.start` waits for, but not for ever: a thread without the memory to begin never sets it."""

    def wait(self, timeout: float | None = None) -> bool:
        # Several waits: time also passes while the process is stopped.
        if timeout is not None or any(super(_Started, self).wait(1.0) for _ in range(_START_TIMEOUT_S)):
            return timeout is None or super().wait(timeout)
        raise RuntimeError("the new thread died before it began")


def start_thread(thread: threading.Thread) -> None:
    """`thread.start()`, bounded. Raises RuntimeError: the system has no more threads, or no memory for one."""
    thread._started = _Started()  # type: ignore[attr-defined]
    try:
        thread.start()
    except RuntimeError:
        # Among the threads that are starting, it would be listed for ever.
        getattr(threading, "_limbo", {}).pop(thread, None)
        raise


_Job = tuple["Future[Any]", Callable[..., Any], tuple[Any, ...], dict[str, Any]]


class DaemonExecutor(Executor):
    """`num_threads` daemon threads called `name`, all started at once: none could be started any more while the
    interpreter exits.

    Args:
        on_start: called on each thread before its first job.
    """

    def __init__(self, name: str, num_threads: int, *, on_start: Callable[[], object] = lambda: None) -> None:
        self._pid = os.getpid()
        self._name = name
        self._on_start = on_start
        self.refusal: BaseException | None = None
        """Why no work is accepted any more; None while it is."""
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{k}", daemon=True) for k in range(num_threads)
        ]
        for k, thread in enumerate(self._threads):
            try:
                start_thread(thread)
            except BaseException as error:
                # Those that run must not be left behind: where the system had no more threads all before this one,
                # after an interrupt perhaps this one too. Another interrupt may come at any call, so each is tried
                # again.
                self._threads = self._threads[: k if isinstance(error, RuntimeError) else k + 1]
                for _ in TRIES:
                    try:
                        self.shutdown(wait=isinstance(error, RuntimeError))
                        break
                    except BaseException:  # noqa: BLE001
                        continue
                raise

    @property
    def num_queued(self) -> int:
        """Jobs that no thread has taken yet, about."""
        return self._jobs.qsize()

    @property
    def native_ids(self) -> list[int]:
        return [thread.native_id for thread in self._threads if thread.native_id is not None]

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Queue `fn`, first in first out. Never blocks. Raises TransactionStateError: shut down, its thread died, or in
        a forked child."""
        check_process(self._pid, f"executor {self._name!r}")
        future: Future[T] = Future()
        # No lock: a signal handler that has interrupted this may wait for a thread that submits here too.
        if self.refusal is None:
            self._jobs.put((future, fn, args, kwargs))
        # Shut down meanwhile, it may lie behind the last job.
        if self.refusal is not None and future.cancel():
            raise TransactionStateError(f"executor {self._name!r} accepts no work: {self.refusal}") from self.refusal
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept no more work; what is queued still runs, or fails at once with `cancel_futures`. `wait` joins the
        threads."""
        check_process(self._pid, f"executor {self._name!r}")
        self._refuse(TransactionStateError(f"executor {self._name!r} was shut down"), drop=cancel_futures)
        if wait:
            self.join(None)

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the threads to end, after `shutdown`; False when one is still at work after `timeout_s` seconds."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread() and thread.ident is not None:
                thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads if thread is not threading.current_thread())

    def _refuse(self, error: BaseException, *, drop: bool) -> None:
        self.refusal = self.refusal or error
        while drop:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None and job[0].set_running_or_notify_cancel():
                job[0].set_exception(error)
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        try:
            self._on_start()
            while (job := self._jobs.get()) is not None:
                self._run(*job)
                # An idle thread must not keep the last job's memory alive.
                del job
        except BaseException as error:  # noqa: BLE001 -- an exception injected between jobs: queued work must learn it
            death = TransactionStateError(f"a thread of executor {self._name!r} died: {error!r}")
            death.__cause__ = error
            self._refuse(death, drop=True)

    @staticmethod
    def _run(future: Future[Any], fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = fn(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 -- the waiter gets it, whatever it is
            future.set_exception(error)
        else:
            future.set_result(result)


def run_on_threads(name: str, num_threads: int, work: Callable[[], object], *, stop: Callable[[], object]) -> None:
    """Run `work` on each of so many threads of their own. Blocks until all have ended, which `stop` makes them do soon
    when one has failed or this thread is interrupted; the first failure, or the last interrupt, is raised."""
    pool = DaemonExecutor(name, num_threads)
    interrupted = None
    try:
        for result in [pool.submit(work) for _ in range(num_threads)]:
            result.result()
    finally:
        # No call stands outside of the inner `try`: the next interrupt would leave the threads.
        for _ in TRIES:
            try:
                stop()
                pool.shutdown()
                break
            except BaseException as error:  # noqa: BLE001 -- raised below
                interrupted = error
        if interrupted is not None:
            raise interrupted


async def run_aside(name: str, fn: Callable[[], T]) -> T:
    """Run `fn` on a daemon thread of its own. Raises RuntimeError: the system has no more threads."""
    import asyncio

    executor = DaemonExecutor(name, 1)
    done = executor.submit(fn)
    try:
        return await asyncio.wrap_future(done)
    finally:
        executor.shutdown(wait=done.done())
