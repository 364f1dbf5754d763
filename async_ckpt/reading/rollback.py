"""Writes into existing tensors while a file is still being read, and takes it back if the file turns out bad.

Guarantees:
- After `roll_back` every byte that was overwritten has its old value again, also where pieces overlap.

The old bytes are set aside while the disk is being waited for, which holding the new ones until the last is verified
cannot use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from ..host.memory import address_of, move, region
from ..threads.locks import Lock
from .scatter import Scatter
from .verified_file import MemorySource


class Rollback:
    """A `verified_file.Consume` that sets aside what `scatter` is about to overwrite, in memory of `region_bytes` at a
    time.

    Any thread; `close` gives lent memory back.
    """

    def __init__(self, scatter: Scatter, lend: MemorySource | None, region_bytes: int) -> None:
        self._scatter = scatter
        self._lend = lend
        self._region_bytes = region_bytes
        self._lock = Lock()
        self._writing: set[int] = set()
        """Threads."""
        self._is_over = False
        self._log: list[tuple[int, int, int]] = []
        """(target address, address of its old bytes, size), in the order in which they were set aside."""
        self._regions: list[memoryview] = []
        self._left = 0
        self._next = 0
        self._give_back: list[Callable[[], None]] = []

    def __call__(self, offset: int, view: memoryview) -> None:
        """Set aside, then overwrite; does nothing once the roll-back has begun."""
        with self._lock:
            if self._is_over:
                return
            self._writing.add(threading.get_ident())
        try:
            self._overwrite(offset, view)
        finally:
            with self._lock:
                self._writing.discard(threading.get_ident())
                self._lock.notify_all()

    def _overwrite(self, offset: int, view: memoryview) -> None:
        targets = [(address, size) for address, size in self._scatter.targets(offset, view.nbytes) if size]
        if targets:
            at = self._take(sum(size for _, size in targets))
            entries = []
            for address, size in targets:
                move(at, address, size)
                entries.append((address, at, size))
                at += size
            # Whoever writes to the same bytes later has set aside what this thread wrote, and stands behind this in the
            # log.
            with self._lock:
                self._log += entries
        self._scatter(offset, view)

    def _take(self, num_bytes: int) -> int:
        """Address of memory for `num_bytes` old bytes."""
        with self._lock:
            if num_bytes > self._left:
                wanted = max(num_bytes, self._region_bytes)
                lent = self._lend(wanted) if self._lend is not None else None
                memory, give_back = (region(wanted), None) if lent is None else lent
                if give_back is not None:
                    self._give_back.append(give_back)
                self._regions.append(memory)
                self._left, self._next = memory.nbytes, address_of(memory)
            at = self._next
            self._next += num_bytes
            self._left -= num_bytes
        return at

    def roll_back(self) -> None:
        """Write every old byte back; may be called again where it was interrupted. Blocks for writes under way and one
        copy.
        """
        with self._lock:
            self._is_over = True
            # What this thread was writing was interrupted, or there would be no roll-back.
            while not self._writing <= {threading.get_ident()}:
                self._lock.wait()
        for address, saved, size in reversed(self._log):
            move(address, saved, size)
        self._log.clear()

    def close(self) -> None:
        """Forget the old bytes."""
        self._log.clear()
        self._regions.clear()
        for give_back in self._give_back:
            give_back()
        self._give_back.clear()
