"""What other threads are executing, looked at without harm.

Python 3.11 makes frame objects when somebody asks for them. To make one may start a garbage collection; a finalizer that gives up the GIL
in it lets the other thread leave the frame that is being asked for, and what is returned is whatever lies in that memory by then. (From
3.12 on collections wait for the interpreter's own loop; before 3.11 frames were objects already.) So there the collector is off during
such a call, in one loop in C, in which no thread gets a turn.
"""

from __future__ import annotations

import gc
import operator
import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
_caller_of = operator.attrgetter("f_back")


def innermost_frames() -> dict[int, FrameType]:
    """The frame that each thread is in, by ident. Any thread; does not block."""
    return _uncollected(sys._current_frames)


def calling_frame(frame: FrameType) -> FrameType | None:
    """The frame that `frame`, perhaps of another thread, was called from."""
    caller: FrameType | None = _uncollected(partial(_caller_of, frame))
    return caller


def _uncollected(call: Callable[[], T]) -> T:
    if sys.version_info[:2] == (3, 11) and gc.isenabled():
        outcomes = list(map(operator.call, (gc.disable, call, gc.enable)))
        found: T = outcomes[1]
        return found
    return call()
