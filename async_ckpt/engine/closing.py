"""The ordered end of an engine: open checkpoints are given up, pending commits waited for, threads stopped. Bounded."""

from __future__ import annotations

import logging
import time

from ..errors import BackpressureTimeout, report
from ..threads.executor import check_process
from .checkpoint import given_up
from .commits import Commits
from .preemption import Preemption, no_workers_death


def close(commits: Commits, preemption: Preemption | None = None, reason: BaseException | None = None) -> None:
    """See `AsyncCheckpointEngine.close`. `reason`: the exception that has led here, if there is one."""
    check_process(commits.pid, "this engine")
    if commits.closed:
        commits.stop(commits.close_timeout_s)
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
        finish(commits, min(left_s, commits.close_timeout_s), reason)
    except Exception as second:
        if first is not None:
            report(logging.ERROR, "closing the engine on %r failed, after %r: %s", commits.root, first, second)
            raise first  # noqa: B904 -- with the second as its context
        raise
    if first is not None:
        raise first
    commits.raise_unacknowledged()


def leave_block(commits: Commits, preemption: Preemption | None, error: BaseException) -> None:
    """`close` where a block ends with `error`, which is on its way out and must not be replaced."""
    with no_workers_death():
        if preemption is not None:
            preemption.leave_with(error)
        try:
            close(commits, preemption, error)
        except Exception as failure:  # noqa: BLE001
            told = "while leaving the block with %r, closing the engine failed too: %s"
            report(logging.WARNING, told, error, failure, warning=RuntimeWarning, stacklevel=3)


def finish(commits: Commits, timeout_s: float, reason: BaseException | None) -> None:
    """Wait for pending commits, give up open checkpoints (named in a warning), stop the threads."""
    forgotten: list[str] = []
    deadline = time.monotonic() + timeout_s
    first: BaseException | None = None
    try:
        _give_up_open(commits, reason, forgotten)
        for pending in commits.unfinished():
            if not pending.wait(deadline - time.monotonic()):
                raise BackpressureTimeout(
                    f"{len(commits.unfinished())} commit(s) did not end within {timeout_s:g} s, the first is "
                    f"{pending.tag!r}; waiting for {commits.pool.waiting_for()}. They are not visible; older "
                    "checkpoints are untouched"
                )
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
            commits.pipeline.tell_notes()
            for tag in forgotten:
                told = "checkpoint %r was created but never committed: it is given up, nothing of it is visible"
                report(logging.WARNING, told, tag, warning=RuntimeWarning, stacklevel=5)


def _give_up_open(commits: Commits, reason: BaseException | None, forgotten: list[str]) -> None:
    """Give up all open checkpoints; those that the user does not know of yet are added to `forgotten`."""
    for checkpoint in commits.opened():
        if checkpoint.is_open or checkpoint.is_tolerant:
            forgotten.append(checkpoint.tag)
        error = checkpoint.error or given_up(f"the engine was closed before commit({checkpoint.tag!r})", reason)
        commits.abort(checkpoint.tag, error)
