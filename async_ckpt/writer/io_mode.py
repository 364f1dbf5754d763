"""How a file is written: through the page cache or past it, and with how many writes in flight.

The rule: files under `SMALL_BYTES` go through the cache in one write, because alignment and preallocation cost more
than they bring; larger ones past it (O_DIRECT), with as many writes in flight as the pool has. `io_mode=` is for disks
that like something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SMALL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class IoMode:
    """One way to write a file: `direct` (past the page cache) with at most `depth` chunks of it sealed and written at
    once.
    """

    direct: bool
    depth: int


# Writes through the cache hold the inode's lock: while one runs, the next chunk is sealed.
BUFFERED = IoMode(False, 2)


def choose(io_mode: Literal["auto", "direct", "buffered"], num_writers: int, size_bytes: int) -> IoMode:
    """The way of a file of `size_bytes` bytes."""
    is_direct = io_mode == "direct" or (io_mode == "auto" and size_bytes >= SMALL_BYTES)
    return IoMode(True, num_writers) if is_direct else BUFFERED
