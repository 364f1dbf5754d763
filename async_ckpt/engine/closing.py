"""The end of an engine: in order, by `close`; or where it is dropped, or the interpreter exits, without. Also in
children of multiprocessing.

Guarantees: open checkpoints are given up and named, pending commits waited for, threads stopped; nothing hangs past
`close_timeout_s`. A checkpoint that is lost without `close` makes the exit code non-zero, whatever warnings, streams
and Ctrl-C do meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from concurrent.futures import Future, wait

from ..errors import BackpressureTimeout, ends_with_0, report
from ..threads.executor import check_process
from .checkpoint import given_up
from .commits import Commits, live
from .pipeline import tell
from .preemption import Preemption, no_workers_death

_lost: list[BaseException] = []
_dropped: list[tuple[Commits, Future[None]]] = []
"""Engines that were dropped on threads of their own, and their closing."""
_watched_worker: int | None = None

# What the parent has lost is told by the parent's exit code.
os.register_at_fork(after_in_child=_lost.clear)
os.register_at_fork(after_in_child=_dropped.clear)


def close(commits: Commits, preemption: Preemption | None = None, reason: BaseException | None = None) -> None:
    """See `AsyncCheckpointEngine.close`. `reason`: the exception that has led here, if there is one."""
    check_process(commits.pid, "this engine")
    if commits.closed:
        commits.stop(commits.config.close_timeout_s)
        return
    first: BaseException | None = None
    try:
        if preemption is not None:
            preemption.leave()
    except BaseException as error:  # noqa: BLE001 -- raised below, once the threads have ended
        first = error
    with commits.lock:
        # A call on another thread has ended: what it has begun is known.
        left_s = float("inf") if preemption is None else preemption.remaining_s
    try:
        finish(commits, min(left_s, commits.config.close_timeout_s), reason)
    except SystemExit as error:
        first = first or error
    except Exception as second:
        if first is not None and not ends_with_0(first):
            report(logging.ERROR, "closing the engine on %r failed, after %r: %s", commits.root, first, second)
            raise first  # noqa: B904 -- with the second as its context
        raise
    if first is not None and not ends_with_0(first):
        raise first
    commits.raise_unacknowledged()
    if first is not None:
        raise first


def leave_block(commits: Commits, preemption: Preemption | None, error: BaseException | None) -> None:
    """`close` at the end of a block. An `error` is on its way out and must not be replaced; but where it would end the
    program with exit code 0, a failure is raised."""
    if error is None:
        close(commits, preemption)
        return
    with no_workers_death():
        if preemption is not None:
            preemption.leave_with(error)
        try:
            close(commits, preemption, error)
        except Exception as failure:
            if ends_with_0(error):
                raise
            told = "while leaving the block with %r, closing the engine failed too: %s"
            report(logging.WARNING, told, error, failure, warning=RuntimeWarning, stacklevel=3)


def finish(commits: Commits, timeout_s: float, reason: BaseException | None) -> None:
    """Wait for pending commits, give up open checkpoints (named in a warning), stop the threads. SystemExit out of a
    signal handler comes through when all that has ended."""
    forgotten: list[str] = []
    deadline = time.monotonic() + timeout_s
    first: BaseException | None = None
    exits: list[SystemExit] = []
    try:
        while True:
            try:
                _give_up_open(commits, reason, forgotten)
                _wait_for_pending(commits, deadline, timeout_s)
                break
            except SystemExit as error:
                exits.append(error)
    except BaseException as error:
        first = error
        raise
    finally:
        # KeyboardInterrupt while waiting: the user wants out, and hears of nothing else.
        is_impatient = first is not None and not isinstance(first, Exception)
        try:
            commits.stop(0.1 if is_impatient else max(0.1, deadline - time.monotonic()))
        except BackpressureTimeout as timeout:
            if first is None:
                raise
            if not is_impatient:
                raise first  # noqa: B904 -- with this one as its context
            report(logging.WARNING, "the engine on %r was interrupted while it was closing: %s", commits.root, timeout)
        finally:
            tell(commits.pipeline.notes)
            for tag in forgotten:
                told = "checkpoint %r was created but never committed: it is given up, nothing of it is visible"
                report(logging.WARNING, told, tag, warning=RuntimeWarning, stacklevel=5)
    if exits:
        raise exits[0]


def _wait_for_pending(commits: Commits, deadline: float, timeout_s: float) -> None:
    for pending in commits.unfinished():
        if not pending.wait(deadline - time.monotonic()):
            raise BackpressureTimeout(
                f"{len(commits.unfinished())} commit(s) did not end within {timeout_s:g} s, the first is "
                f"{pending.tag!r}; waiting for {commits.pool.waiting_for()}. They are not visible; older "
                "checkpoints are untouched"
            )


def _give_up_open(commits: Commits, reason: BaseException | None, forgotten: list[str]) -> None:
    """Give up all open checkpoints; those that the user does not know of yet are added to `forgotten`."""
    for checkpoint in commits.opened():
        if checkpoint.is_open or checkpoint.is_tolerant:
            forgotten.append(checkpoint.tag)
        error = checkpoint.error or given_up(f"the engine was closed before commit({checkpoint.tag!r})", reason)
        commits.abort(checkpoint.tag, error)


# Without `close`.


def watch(engine: object, commits: Commits) -> None:
    """Finish `commits` when `engine` is dropped or the interpreter exits, unless it was closed before."""
    _watch_worker()
    # At exit, the order matters: all engines first, then the exit code.
    weakref.finalize(engine, finish_dropped, commits).atexit = False


def _at_exit() -> None:
    try:
        _finish_all()
    finally:
        _exit_if_lost()


def _finish_all() -> None:
    for commits in list(live):
        try:
            finish_dropped(commits)
        except BaseException as error:  # noqa: BLE001
            # Ctrl-C: the others are still to be finished, and the exit code tells.
            _lost.append(error)
    for commits, closing in _dropped:
        wait([closing], commits.config.close_timeout_s)


def _exit_if_lost() -> None:
    if not _lost:
        return
    try:
        # Closed, or None, or a full disk.
        with contextlib.suppress(BaseException):
            logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
    finally:
        # Exit code 0 would be a lie, and nothing that runs later could change it.
        os._exit(1)


atexit.register(_at_exit)


def _watch_worker() -> None:
    """Children of multiprocessing end by `os._exit`, after their own list of finalizers and without atexit's."""
    global _watched_worker
    process, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
    if process is None or util is None or process.parent_process() is None or _watched_worker == os.getpid():
        return
    _watched_worker = os.getpid()
    # Commits first; the exit code last of all, so that what the child has put into queues still gets out.
    util.Finalize(None, _finish_all, exitpriority=1000)
    util.Finalize(None, _exit_if_lost, exitpriority=-1000)


def finish_dropped(commits: Commits) -> None:
    """Finish what a dropped engine left pending, then say so. Any thread, also in the middle of garbage collection."""
    if os.getpid() != commits.pid or commits.closed:
        return
    pending = [p.tag for p in commits.unfinished()]
    if threading.current_thread().name.startswith("async-ckpt"):
        # Collected on one of its own threads: waiting here for that thread would never end. Whoever exits waits for the
        # other one, which may be inside torch, and is not to free what is left: an interpreter that ends meanwhile
        # takes the process down.
        _dropped[:] = [(known, closing) for known, closing in _dropped if not closing.done()]
        _dropped.append((commits, commits.pool.submit_io(lambda: _close(commits))))
    else:
        _close(commits)
    what = f"pending were {', '.join(map(repr, pending))}" if pending else "nothing was pending"
    told = "the engine on %r was never closed (%s); use `with` or close()"
    report(logging.WARNING, told, commits.root, what, warning=ResourceWarning, stacklevel=2)
    if pending:
        report(logging.WARNING, told, commits.root, what)


def _close(commits: Commits) -> None:
    try:
        # At exit: the exception that has ended the program, which the other ranks learn as the cause.
        try:
            finish(commits, commits.config.close_timeout_s, getattr(sys, "last_value", None))
        except SystemExit:
            # It has come when the program was exiting already.
            if commits.unfinished():
                raise
        commits.raise_unacknowledged()
    except BaseException as error:  # noqa: BLE001
        # Whatever failed it, the others are still to be finished, and the exit code tells.
        _lost.append(error)
        report(logging.ERROR, "a checkpoint was lost while the engine on %r was dropped: %s", commits.root, error)
