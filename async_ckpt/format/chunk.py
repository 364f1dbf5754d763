"""A piece of a file in staging memory, on its way from the snapshot to the writer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class Chunk:
    """One unit of work: the extent `[offset, offset + nbytes)` of a file, in staging memory.

    `buffer` is page-aligned and holds at least `nbytes` rounded up to 4096; the writer may zero what lies between.
    Nobody else touches it meanwhile. `release` is called exactly once, on any thread, after the last touch: written or
    given up. It must not raise.
    """

    offset: int
    nbytes: int
    buffer: memoryview
    release: Callable[[], None]
    is_elsewhere: bool = False
    """Its bytes are not in `buffer`: they are those of the older file that the new one shares."""
    is_scarce: bool = False
    """The next chunk waits for this one's memory."""
