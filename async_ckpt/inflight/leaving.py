"""What happens when an engine is dropped, or the interpreter exits, without `close`. Also in children of multiprocessing.

Guarantees: pending commits are finished (with a warning), checkpoints that were never committed are named, nothing
hangs past `close_timeout_s`, and a checkpoint that is lost this way makes the exit code non-zero.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import InFlight

logger = logging.getLogger("async_ckpt")

_live: weakref.WeakSet[InFlight] = weakref.WeakSet()
_lost: list[BaseException] = []
_watched_worker: int | None = None


def watch(engine: object, inflight: InFlight) -> Callable[[], object]:
    """Finish `inflight` when `engine` is dropped or the interpreter exits; returns what calls that off."""
    _live.add(inflight)
    _watch_worker()
    finalizer = weakref.finalize(engine, finish, inflight)
    # At exit, the order matters: all engines first, then the exit code.
    finalizer.atexit = False
    return finalizer.detach


def _at_exit() -> None:
    _finish_all()
    _exit_if_lost()


def _finish_all() -> None:
    for inflight in list(_live):
        finish(inflight)


def _exit_if_lost() -> None:
    if _lost:
        # Exit code 0 would be a lie, and nothing that runs later could change it.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
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


def finish(inflight: InFlight) -> None:
    """Finish what a dropped engine left pending, and say so. Any thread, also in the middle of garbage collection."""
    if os.getpid() != inflight.pid or inflight.closed:
        return
    pending = [p.tag for p in inflight.unfinished()]
    what = f"finishing the pending commits of {', '.join(map(repr, pending))}" if pending else "nothing is pending"
    warnings.warn(f"the engine on {inflight.root!r} was never closed ({what}); use `with` or close()", ResourceWarning, stacklevel=2)
    if pending:
        logger.warning("the engine on %r was never closed: %s", inflight.root, what)
    if threading.current_thread().name.startswith("async-ckpt"):
        # Collected on one of its own threads: waiting here for that thread would never end.
        inflight.prefault.submit(lambda: _close(inflight))
    else:
        _close(inflight)


def _close(inflight: InFlight) -> None:
    try:
        # At exit: the exception that has ended the program, which the other ranks learn as the cause.
        inflight.close(reason=getattr(sys, "last_value", None))
        inflight.raise_unacknowledged()
    except Exception as error:  # noqa: BLE001 -- whatever failed it, the others are still to be finished, and the exit code tells
        logger.error("a checkpoint was lost while the engine on %r was dropped: %s", inflight.root, error)
        _lost.append(error)
