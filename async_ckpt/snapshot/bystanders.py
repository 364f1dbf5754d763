"""Other threads that may be inside an operation that changes tensors: their version counters have not moved yet.

Torch moves a tensor's version counter when an in-place operation *ends*. A copy that was made in the middle of one, on another
thread, holds a mixture, and counters that are compared at once say that nothing has changed. So whoever compares them waits until
every thread that may have been inside an operation when the copy ended has been seen outside of it.

A thread is taken to be outside when it has gone on to another instruction, when it waits in the standard library or runs this
package's own code (which changes no user's tensor but in `load_into`), or when it sleeps and so does every thread of C++ that
might compute for it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType

from ..filesystem.running import running_threads

# The first wait between two looks; each next one is longer by half, up to the last.
_FIRST_POLL_S = 0.0005
_LAST_POLL_S = 0.01
# A thread that computes with others sleeps at their barriers, but not for several looks in a row.
_NUM_LOOKS = 3

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_CHANGES_TENSORS = (_PACKAGE + "restore" + os.sep, _PACKAGE + "demo" + os.sep)
_LIBRARY = os.path.dirname(os.path.abspath(threading.__file__)) + os.sep
_WAITING = ("threading.py", "selectors.py", "socket.py", "ssl.py", "subprocess.py", "connection.py", os.path.join("futures", "thread.py"))

_Place = tuple[int, int]
"""A frame and the instruction in it. By identity: to hold the frame would keep its locals alive."""


class Bystanders:
    """The other threads, as they are when this is made. One thread at a time."""

    def __init__(self) -> None:
        me = threading.get_ident()
        self._inside = {
            ident: _place(frame) for ident, frame in sys._current_frames().items() if ident != me and not _is_harmless(frame.f_code)
        }
        self._num_asleep = 0

    @property
    def any_inside(self) -> bool:
        """Whether one of them may still be inside what it was in. To be asked until it is False; does not block."""
        if self._inside:
            now = {ident: _place(frame) for ident, frame in sys._current_frames().items()}
            self._inside = {ident: place for ident, place in self._inside.items() if now.get(ident) == place}
        if self._inside:
            self._num_asleep = self._num_asleep + 1 if self._all_sleep() else 0
        return bool(self._inside) and self._num_asleep < _NUM_LOOKS

    def wait(self, timeout_s: float, is_settled: Callable[[], bool]) -> None:
        """Return when no bystander is inside any more, when `is_settled()`, or after `timeout_s`. Blocks without the GIL."""
        deadline, poll_s = time.monotonic() + timeout_s, _FIRST_POLL_S
        while self.any_inside and not is_settled() and time.monotonic() < deadline:
            time.sleep(poll_s)
            poll_s = min(1.5 * poll_s, _LAST_POLL_S)

    def _all_sleep(self) -> bool:
        """Whether nothing runs in this process but threads that were not inside anything."""
        running = running_threads()
        if running is None:
            return False
        outside = {thread.native_id for thread in threading.enumerate() if thread.ident not in self._inside}
        return running <= outside


def _place(frame: FrameType) -> _Place:
    return id(frame), frame.f_lasti


def _is_harmless(code: CodeType) -> bool:
    """Whether a thread in `code` changes no tensor there: our own code, or waits of the standard library."""
    name = code.co_filename
    if name.startswith(_PACKAGE):
        return not name.startswith(_CHANGES_TENSORS)
    # `run` may call an operation itself, as a thread's target.
    return name.startswith(_LIBRARY) and name.endswith(_WAITING) and code.co_name != "run"
