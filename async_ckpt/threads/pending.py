"""Something that is on its way, as its user holds it: one object with a blocking face and an awaitable one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVar

from ..errors import BackpressureTimeout, report
from .outcome import Outcome

Self = TypeVar("Self", bound="Pending")

_unnamed: dict[Pending, str] = {}
"""What this process has pending and `name_pending` has not named yet, with the real path of its root."""


def run_guarded(call: Callable[[], object]) -> None:
    """Call the user's code here and now; what it raises, SystemExit too, is logged and harms nothing."""
    try:
        call()
    except BaseException as error:  # noqa: BLE001 - foreign code: whatever it raises must not fail a checkpoint
        report(logging.ERROR, "a callback raised %r", error, cause=error)


def announce(pending: Pending, real_root: str) -> None:
    """Let `name_pending` name it until it has ended. Never asks the disk."""
    _unnamed[pending] = real_root
    pending.when_done(lambda ended: _unnamed.pop(ended, None))


def name_pending(root: str) -> None:
    """Warn, once, of each commit that this process has pending in `root`: who resumes now resumes from before it."""
    real = os.path.realpath(root)
    for pending, where in list(_unnamed.items()):
        if where == real and not pending.is_inherited and _unnamed.pop(pending, None) is not None:
            told = "the commit of %r in %r is pending in this process, and does not count yet: wait for it"
            report(logging.WARNING, told, pending.tag, root)


class Pending(Outcome[str]):
    """What happens to the checkpoint `tag`.

    Guarantees:
    - Resolves exactly once: to the tag, or to the first failure.
    - Giving up waiting (a timeout, a cancelled ``await``) never cancels what is waited for.
    - May be used from any thread and awaited from any event loop, any number of times; a forked child is refused at
      once (`TransactionStateError`): what is pending is its parent's.

    Args:
        run_callback: runs the user's callbacks; must not block or raise.
    """

    def __init__(self, tag: str, run_callback: Callable[[Callable[[], object]], object] = run_guarded) -> None:
        super().__init__()
        self.tag = tag
        self.acknowledged = False
        """Whether somebody has asked for the outcome (`result`, `exception` or ``await``)."""
        self._run_callback = run_callback

    @property
    def is_inherited(self) -> bool:
        """Whether it is the parent's of this forked process."""
        return os.getpid() != self._pid

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Block until it ended; returns its failure, or None.

        Raises:
            BackpressureTimeout: it did not end within `timeout` seconds; says what it waits for. It goes on.
        """
        error = super().exception(timeout)
        self.acknowledged = True
        return error

    def add_done_callback(self: Self, callback: Callable[[Self], object]) -> None:
        """Call `callback(self)` once it ended, on the engine's thread for callbacks and observers, one after the other.

        No checkpoint waits for it: it may block, and call the engine. What it raises is logged and harms nothing.
        """
        self.when_done(lambda _: self._run_callback(lambda: callback(self)))

    def __repr__(self) -> str:
        if self.is_inherited:
            state = f"of process {self._pid}"
        else:
            state = "pending" if not self.done() else ("done" if self.failure() is None else "failed")
        return f"<{type(self).__name__} {self.tag!r} {state}>"

    def _still_waits(self, what: str) -> str:
        """The message of a timeout, which says `what`; and what it waits for."""
        return f"{self!r} {what}"

    def _timeout_error(self, what: str) -> TimeoutError:
        return BackpressureTimeout(self._still_waits(what))
