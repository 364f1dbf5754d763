"""What happens when an engine is dropped, or the interpreter exits, without `close`. Also in children of
multiprocessing.

Guarantees: pending commits are finished (with a warning), checkpoints that were never committed are named, nothing
hangs past `close_timeout_s`, and a checkpoint that is lost this way makes the exit code non-zero, whatever warnings,
streams and Ctrl-C do meanwhile.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import weakref

from ..errors import report
from .closing import finish as finish_commits
from .commits import Commits, live

_lost: list[BaseException] = []
_watched_worker: int | None = None

# What the parent has lost is told by the parent's exit code.
os.register_at_fork(after_in_child=_lost.clear)


def watch(engine: object, commits: Commits) -> None:
    """Finish `commits` when `engine` is dropped or the interpreter exits, unless it was closed before."""
    _watch_worker()
    # At exit, the order matters: all engines first, then the exit code.
    weakref.finalize(engine, finish, commits).atexit = False


def _at_exit() -> None:
    try:
        _finish_all()
    finally:
        _exit_if_lost()


def _finish_all() -> None:
    for commits in list(live):
        try:
            finish(commits)
        except BaseException as error:  # noqa: BLE001
            # Ctrl-C: the others are still to be finished, and the exit code tells.
            _lost.append(error)


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


def finish(commits: Commits) -> None:
    """Finish what a dropped engine left pending, then say so. Any thread, also in the middle of garbage collection."""
    if os.getpid() != commits.pid or commits.closed:
        return
    pending = [p.tag for p in commits.unfinished()]
    if threading.current_thread().name.startswith("async-ckpt"):
        # Collected on one of its own threads: waiting here for that thread would never end.
        commits.pool.submit_io(lambda: _close(commits))
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
        finish_commits(commits, commits.close_timeout_s, getattr(sys, "last_value", None))
        commits.raise_unacknowledged()
    except BaseException as error:  # noqa: BLE001
        # Whatever failed it, the others are still to be finished, and the exit code tells.
        _lost.append(error)
        report(logging.ERROR, "a checkpoint was lost while the engine on %r was dropped: %s", commits.root, error)
