"""Other threads that may be inside an operation that changes tensors: their version counters have not moved yet.

Torch moves a tensor's version counter when an in-place operation *ends*. A copy that was made in the middle of one, on another
thread, holds a mixture, and counters that are compared at once say that nothing has changed. So whoever compares them waits until
every thread that may have been inside an operation when the copy ended has been seen outside of it.

Guarantees:
- A thread is called outside only when it has gone on to another instruction, waits in the standard library, runs this package's own
  code where that changes no tensor of the user's, or sleeps: at once in a system call that waits for no thread, and at a lock or a
  barrier after several looks, or after a while where threads run that Python does not know and that may compute for it. A place
  where a thread has slept for so long is remembered: it is waited for once.
- Nothing of another thread is kept alive, and no frame but its innermost is looked at.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import CodeType, FrameType

from ..host.frames import innermost_frames
from ..host.running import may_wait_for_threads, running_threads
from ..threads.locks import Lock

# The first wait between two looks; each next one is longer by half, up to the last.
_FIRST_POLL_S = 0.0005
_LAST_POLL_S = 0.01
# A thread that computes with others sleeps at their barriers: for as long as one of them has no core.
_NUM_LOOKS = 3
_SLEEP_BESIDE_OTHERS_S = 0.2

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_CHANGES_TENSORS = tuple(_PACKAGE + name + os.sep for name in ("restore", "integrations", "demo"))
_LIBRARY = os.path.dirname(os.path.abspath(threading.__file__))
_WAITING = frozenset(
    os.path.join(_LIBRARY, name)
    for name in (
        "threading.py",
        "selectors.py",
        "socket.py",
        "ssl.py",
        "subprocess.py",
        os.path.join("multiprocessing", "connection.py"),
        os.path.join("concurrent", "futures", "thread.py"),
    )
)

_Place = tuple[int, int]
"""A frame and the instruction in it. By identity: to hold the frame would keep its locals alive."""

_sleepers: dict[int, _Place] = {}
"""Where threads were last found asleep for long, by ident."""


class Bystanders:
    """The other threads, as they are when this is made. Any thread."""

    def __init__(self) -> None:
        me = threading.get_ident()
        self._lock = Lock()
        self._inside = {
            ident: _place(frame)
            for ident, frame in innermost_frames().items()
            if ident != me and not _is_harmless(frame.f_code) and _sleepers.get(ident) != _place(frame)
        }
        self._asleep: dict[int, tuple[int, float]] = {}
        """How often in a row threads were found asleep, and since when."""

    @property
    def any_inside(self) -> bool:
        """Whether one of them may still be inside what it was in. To be asked until it is False; does not block."""
        with self._lock:
            if self._inside:
                now = {ident: _place(frame) for ident, frame in innermost_frames().items()}
                self._inside = {ident: place for ident, place in self._inside.items() if now.get(ident) == place}
            if self._inside:
                self._look_at_sleepers()
            return bool(self._inside)

    def wait(self, timeout_s: float, is_settled: Callable[[], bool]) -> None:
        """Return when no bystander is inside any more, when `is_settled()`, or after `timeout_s`. Blocks without the GIL."""
        deadline, poll_s = time.monotonic() + timeout_s, _FIRST_POLL_S
        while self.any_inside and not is_settled() and time.monotonic() < deadline:
            time.sleep(poll_s)
            poll_s = min(1.5 * poll_s, _LAST_POLL_S)

    def _look_at_sleepers(self) -> None:
        running = running_threads()
        if running is None:
            return
        threads = {thread.ident: thread.native_id for thread in threading.enumerate()}
        others_run = not running <= {*threads.values(), threading.get_native_id()}
        now_s = time.monotonic()
        for ident in list(self._inside):
            native_id = threads.get(ident)
            if native_id is None or native_id in running:
                self._asleep.pop(ident, None)
                continue
            num_looks, since_s = self._asleep.get(ident, (0, now_s))
            self._asleep[ident] = num_looks + 1, since_s
            has_slept_long = now_s - since_s >= _SLEEP_BESIDE_OTHERS_S
            if has_slept_long:
                _sleepers[ident] = self._inside[ident]
            if has_slept_long or (not others_run and num_looks + 1 >= _NUM_LOOKS) or not may_wait_for_threads(native_id):
                del self._inside[ident]


def _place(frame: FrameType) -> _Place:
    return id(frame), frame.f_lasti


def _is_harmless(code: CodeType) -> bool:
    """Whether a thread in `code` changes no tensor there: our own code, or waits of the standard library."""
    name = code.co_filename
    if name.startswith(_PACKAGE):
        return not name.startswith(_CHANGES_TENSORS)
    # `run` may call an operation itself, as a thread's target.
    return name in _WAITING and code.co_name != "run"
