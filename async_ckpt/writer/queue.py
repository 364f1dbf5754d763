"""The chunks of one file, from the moment they are handed over until they are released: each exactly once."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator

from ..format.chunk import Chunk
from ..threads.locks import Lock
from .disk import Disk, problem_with


class ChunkQueue:
    """Waits for nothing. Any thread; what says so is called with `lock`, the file's.

    Args:
        span: the bytes of the file that are to come.
        is_late: whether no chunk is taken any more.
        refuse: told what is wrong with a chunk, which is released.
    """

    def __init__(
        self,
        disk: Disk,
        span: tuple[int, int],
        lock: Lock,
        *,
        is_late: Callable[[], bool],
        refuse: Callable[[str], None],
    ) -> None:
        self.extent_bytes = 0
        self.next_offset, self.end = span
        self.is_scarce = False
        """Whether later chunks wait for the memory of these."""
        self.held_back: list[Chunk] | None = None
        """Sealed and not written: while each is equal to the older file's, the file may become a link to that."""
        self._disk = disk
        self._lock = lock
        self._is_late = is_late
        self._refuse = refuse
        self.inbox: deque[Chunk] = deque()
        """Handed over by the caller, in a single operation (interrupted, this has all of the chunks or none), and not
        looked at yet."""
        self._held: dict[int, Chunk] = {}
        self.keeps = False
        """Whether what is released is kept, so that it can be taken back."""
        self._kept: dict[int, Chunk] = {}
        self.waiting: deque[Chunk] = deque()
        """To be written. With the lock."""

    @property
    def num_bytes_held_back(self) -> int | None:
        """None where nothing is held back (any more)."""
        held = self.held_back
        return None if held is None else sum(chunk.nbytes for chunk in held)

    def has_taken(self, offset: int) -> bool:
        """Whether the chunk at `offset` was taken over, and so is released here."""
        # In this order: it is counted before it leaves the inbox.
        return any(chunk.offset == offset for chunk in list(self.inbox)) or offset < self.next_offset

    def take_over(self) -> None:
        """Queue what was handed over, or release it where the file has failed or the chunk is wrong."""
        while self.inbox:
            with self._lock:
                if not self.inbox:
                    return
                chunk, problem = self.inbox[0], None
                is_late = self._is_late()
                if not is_late:
                    problem = problem_with(chunk, self.next_offset, self.extent_bytes, self.end)
                if problem is None and not is_late:
                    self.extent_bytes = self.extent_bytes or chunk.nbytes
                    self._held[chunk.offset] = chunk
                    self.next_offset += chunk.nbytes
                    self._disk.count(+1)
                    self.waiting.append(chunk)
                    self.is_scarce |= chunk.is_scarce
                self.inbox.popleft()
            if problem is not None:
                self._refuse(f"chunk of {chunk.nbytes} bytes at offset {chunk.offset} of {{}}: {problem}")
            if problem is not None or is_late:
                chunk.release()

    def hold_back(self, held: list[Chunk], chunk: Chunk, *, more: bool) -> None:
        """Add a sealed chunk to those held back; `more` False: it is the last one, and all are put back. With the
        lock."""
        held.append(chunk)
        if not more:
            self.put_back()

    def put_back(self) -> None:
        """Put what was held back in front of the others. With the lock."""
        held, self.held_back = self.held_back or [], None
        self.waiting.extendleft(reversed(held))

    def release(self, chunk: Chunk) -> None:
        """Give one chunk back, unless that was done, or keep it; no thread may use it any more."""
        if self._held.pop(chunk.offset, None) is None:
            return
        self._disk.count(-1)
        if self.keeps:
            self._kept[chunk.offset] = chunk
        # Also where `let_go` has come in between, and has not seen it.
        if not self.keeps and self._kept.pop(chunk.offset, chunk) is chunk:
            chunk.release()

    def let_go(self) -> bool:
        """Give back what is kept, and keep no more; False where nothing is kept. Any thread, and no lock: whom a signal
        handler interrupts here may have it."""
        did_keep, self.keeps = self.keeps, False
        for chunk in self._take_kept():
            chunk.release()
        return did_keep

    def take_back(self) -> bool:
        """Queue all chunks again, from the first one on, and keep none any more; False where some are gone. With the
        lock."""
        self.keeps = False
        kept = {chunk.offset: chunk for chunk in self._take_kept()}
        self._disk.count(len(kept))
        self._held.update(kept)
        self.held_back, self.waiting = None, deque(self._held[offset] for offset in sorted(self._held))
        return sum(chunk.nbytes for chunk in self.waiting) == self.next_offset

    def _take_kept(self) -> Iterator[Chunk]:
        with contextlib.suppress(KeyError):
            while True:
                yield self._kept.popitem()[1]

    def release_all(self) -> None:
        """Give all of them back; no thread may use them any more, and no other will come."""
        if self.keeps:
            self.let_go()
        self.take_over()
        self.waiting.clear()
        for chunk in list(self._held.values()):
            self.release(chunk)
