"""Where snapshots wait in RAM: one arena of page-aligned chunks, faulted in early and reused for ever.

Guarantees:
- The arena never holds more than `num_chunks * chunk_bytes`; every chunk is owned by one snapshot at a time.
- A chunk is handed out again only after `release`; reservations are all or nothing.
- `poison` ends every wait with its cause, now and later.

Touching fresh memory costs 10 to 30 times a copy into warm memory, so chunks are faulted in ahead (`fault_in`)
and warm chunks are handed out first. The mapping is private, backed by huge pages where the kernel has them, and (but
for what is handed to the user) not inherited by forked children, so that a fork never makes the parent pay for
copy-on-write.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
import time
import weakref
from bisect import insort
from collections import deque
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import torch

from ..errors import BackpressureTimeout, TransactionStateError
from ..host.device import Pinning
from ..host.memory import populate, region, view_at
from ..threads.locks import Lock

_Piece = tuple[torch.Tensor, memoryview, int]
_address_of = itemgetter(2)
# What a background thread could not tell is seen after this time.
_LOOK_AGAIN_S = 0.1

live: weakref.WeakSet[StagingArena] = weakref.WeakSet()
_inherited: list[StagingArena] = []
# A forked child must never unmap these addresses: they are not mapped there, and may be somebody else's by then.
os.register_at_fork(after_in_child=lambda: _inherited.extend(live))


class StagingChunk:
    """One aligned piece of the arena, held: `tensor` (uint8, shape [chunk_bytes]), `view` and `address` of the same
    memory.

    Dropping the last reference gives it back: an exception out of a signal handler can strike before anybody knows
    that it was taken.
    """

    __slots__ = (
        "__weakref__",
        "_arena",
        "address",
        "former_key",
        "is_held",
        "num_users",
        "piece",
        "resident_key",
        "tensor",
        "view",
    )

    def __init__(self, piece: _Piece, arena: StagingArena) -> None:
        self.is_held = False
        self.num_users = 0
        self.piece = piece
        self.tensor, self.view, self.address = piece
        self.resident_key: object = None
        """Set by its holder: names what the memory holds from now on. The next holder of the memory finds it in
        `former_key`."""
        self.former_key: object = None
        # Not a weak reference: the garbage collector clears those before it finalizes what holds them, in a cycle with
        # a traceback.
        self._arena = arena

    def __del__(self) -> None:
        # An exception out of a signal handler is caught by nobody here: `StagingArena._reclaim` is for that.
        if getattr(self, "is_held", False):
            self._arena.release(self)


class StagingArena:
    """Staging memory of `num_chunks` chunks of `chunk_bytes` bytes; all methods may be called from any thread."""

    def __init__(
        self, num_chunks: int, chunk_bytes: int, *, pinning: Pinning | None = None, is_inherited: bool = False
    ) -> None:
        """`pinning` makes chunks page-locked, one by one, when they are first used; None leaves them pageable.
        `is_inherited`: a forked child may read what is in them."""
        self.num_chunks = num_chunks
        self.chunk_bytes = chunk_bytes
        self.pinning = pinning
        self._pid = os.getpid()
        # Kept by the chunks alone.
        view: Any = region(num_chunks * chunk_bytes)
        # Advice only: a kernel or a sandbox that refuses it makes forks slower, not wrong.
        with contextlib.suppress(AttributeError, OSError):
            view.obj.madvise(mmap.MADV_DOFORK if is_inherited else mmap.MADV_DONTFORK)
        whole = torch.frombuffer(view, dtype=torch.uint8)
        self._cold: deque[_Piece] = deque()
        """In the order of addresses, as `_warm` is."""
        for k in range(num_chunks):
            low, high = k * chunk_bytes, (k + 1) * chunk_bytes
            piece = whole[low:high]
            self._cold.append((piece, view[low:high], piece.data_ptr()))
        self._warm: deque[_Piece] = deque()
        """In the order of addresses, so that a file that is saved again and again finds its bytes of last time."""
        self._pieces = {piece[2]: piece for piece in self._cold}
        self._holders: dict[int, weakref.ref[StagingChunk]] = {}
        """The last chunk made of each piece, by address."""
        self._resident_keys: dict[int, object] = {}
        """Of free pieces, by address."""
        self._ready: set[int] = set()
        """Addresses of pieces that are touched, and pinned where that is wanted: the others are cold."""
        # Memory that goes back to the system while it is registered stays registered, whatever is mapped there next.
        self._unpin = weakref.finalize(self, _unpin, pinning, self._ready, self._pid)
        self._unpin.atexit = False
        # Background threads do not wait for it: who has it may be interrupted by a signal handler that waits for them.
        self._lock = Lock()
        self._returned: deque[StagingChunk] = deque()
        """Given back, and not looked at yet."""
        self._poison: BaseException | None = None
        self._is_closed = False
        live.add(self)

    @property
    def is_entered(self) -> bool:
        """Whether this thread is inside a call of the arena, as a signal handler may be."""
        return self._lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    @property
    def num_free(self) -> int:
        with self._lock:
            self._reclaim()
            return len(self._warm) + len(self._cold)

    @property
    def num_faulted(self) -> int:
        return len(self._ready)

    @property
    def num_taken(self) -> int:
        with self._lock:
            return len(self._pieces) - self.num_free

    def try_reserve(self, num_chunks: int) -> list[StagingChunk] | None:
        """Take `num_chunks` chunks at once, or none of them (returns None). Never blocks."""
        with self._lock:
            if self._poison is not None:
                raise self._poison
            if len(self._warm) + len(self._cold) < num_chunks:
                self._reclaim()
            if len(self._warm) + len(self._cold) < num_chunks:
                return None
            try:
                return [self._take() for _ in range(num_chunks)]
            except IndexError:
                return None

    def lend(self, num_bytes: int) -> tuple[memoryview, Callable[[], None]] | None:
        """One idle chunk for reading a file into, and what gives it back; None when there is none (any more), or it is
        too small."""
        chunks = self.try_reserve(1) if num_bytes <= self.chunk_bytes and self._poison is None else None
        return None if chunks is None else (chunks[0].view, lambda: self.release(chunks[0]))

    def acquire(self, timeout_s: float) -> StagingChunk:
        """Take one chunk, waiting for the disk to free one. Raises BackpressureTimeout: none within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while True:
                is_late = time.monotonic() >= deadline
                if self._poison is not None:
                    raise self._poison
                if not self._warm and not self._cold:
                    self._reclaim()
                with contextlib.suppress(IndexError):
                    return self._take()
                if is_late:
                    size_bytes = self.num_chunks * self.chunk_bytes
                    raise BackpressureTimeout(
                        f"no staging chunk became free within {timeout_s:g} s: all {self.num_chunks} chunks "
                        f"({size_bytes} bytes) wait for the disk; raise staging_bytes or save less often"
                    )
                self._lock.wait(max(0.0, min(_LOOK_AGAIN_S, deadline - time.monotonic())))

    def release(self, chunk: StagingChunk) -> None:
        """Give a chunk back; giving it back again does nothing. Any thread; never blocks for long."""
        self._returned.append(chunk)
        if threading.current_thread() is threading.main_thread():
            with self._lock:
                self._take_back()
        elif self._lock.acquire(blocking=False):
            # No signal handler interrupts this thread. Where another has the lock, who comes next looks at the chunk.
            self._take_back()
            self._lock.release()

    def _take_back(self) -> None:
        """Look at what was given back. With the lock."""
        while self._returned:
            chunk = self._returned.popleft()
            if chunk.is_held:
                chunk.is_held = False
                self._return_unused(chunk)

    @contextlib.contextmanager
    def using(self, chunk: StagingChunk) -> Iterator[bool]:
        """Keep `chunk`, which its owner may give up meanwhile, from being handed out again within the block; False when
        it was given back already. For threads that no signal handler runs in."""
        with self._lock:
            is_held = chunk.is_held
            chunk.num_users += is_held
        try:
            yield is_held
        finally:
            if is_held:
                with self._lock:
                    chunk.num_users -= 1
                    # The last user gives back what its owner gave up meanwhile.
                    self._return_unused(chunk)

    def poison(self, error: BaseException) -> None:
        """End every present and future wait with `error`: nobody is left to free chunks."""
        # Those who wait look again by themselves: who calls this may not wait for the lock.
        self._poison = self._poison or error

    def fault_in(self, target_bytes: int) -> None:
        """Touch (and pin) memory until `target_bytes` of the arena are warm, chunk by chunk, without the GIL; waits for
        what other threads touch. Raises TransactionStateError where the device refuses to pin."""
        while (chunk := self._hold_cold(target_bytes)) is not None:
            try:
                self._touch(chunk)
            finally:
                self.release(chunk)

    def _hold_cold(self, target_bytes: int) -> StagingChunk | None:
        """The next chunk to touch; None once enough of them are warm, or all is over."""
        is_behind = threading.current_thread() is not threading.main_thread()
        while self._poison is None and len(self._ready) * self.chunk_bytes < target_bytes:
            if is_behind and not self._lock.acquire(timeout=_LOOK_AGAIN_S):
                continue
            with self._lock:
                if is_behind:
                    self._lock.release()
                if self._cold:
                    return self._hold(self._cold)
                self._lock.wait(_LOOK_AGAIN_S)
                self._reclaim()
        return None

    def close(self) -> None:
        """Unpin the memory and hand it back to the system once no chunk is referenced any more."""
        self.poison(TransactionStateError("the engine is closed: its staging memory is gone"))
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._reclaim()
            cold: deque[_Piece] = deque()
            warm: deque[_Piece] = deque()
            free = self._free_addresses()
            taken = {address: piece for address, piece in self._pieces.items() if address not in free}
            # Before any of it goes back to the system.
            self._unpin()
            # One statement without a call, in which no signal handler runs: the numbers stay true to each other.
            self._cold, self._warm, self._pieces, self._is_closed = cold, warm, taken, True

    def _return_unused(self, chunk: StagingChunk) -> None:
        # One that was reclaimed may be somebody else's by now.
        if not chunk.is_held and not chunk.num_users and self._pieces.get(chunk.address) is chunk.piece:
            self._resident_keys[chunk.address] = chunk.resident_key
            self._add_free(chunk.piece)
            self._lock.notify_all()

    def _add_free(self, piece: _Piece) -> None:
        address = _address_of(piece)
        if self._is_closed:
            del self._pieces[address]
        else:
            insort(self._warm if address in self._ready else self._cold, piece, key=_address_of)

    def _reclaim(self) -> None:
        """Take back what nobody holds: an exception out of a signal handler may have struck at the end of its chunk."""
        self._take_back()
        for address in self._pieces.keys() - self._free_addresses():
            chunk = self._holders[address]()
            if chunk is None or not (chunk.is_held or chunk.num_users):
                tensor, view, _ = self._pieces[address]
                self._pieces[address] = tensor, view, address
                self._add_free(self._pieces[address])

    def _free_addresses(self) -> set[int]:
        return {address for pieces in (self._warm, self._cold) for _, _, address in pieces}

    def _take(self) -> StagingChunk:
        if self._warm:
            return self._hold(self._warm)
        chunk = self._hold(self._cold)
        if self.pinning is not None:
            self._touch(chunk)
        # Else its holder touches it.
        self._ready.add(chunk.address)
        return chunk

    def _hold(self, pieces: deque[_Piece]) -> StagingChunk:
        """Raises IndexError where there is none, as where a signal handler that saves has taken the last one
        meanwhile."""
        while True:
            piece = pieces[0]
            chunk = StagingChunk(piece, self)
            holder = weakref.ref(chunk)
            try:
                # No signal is looked at from here to the end of `popleft`. Before, a handler may have taken this very
                # piece.
                if pieces[0] is piece:
                    self._holders[chunk.address] = holder
                    chunk.is_held = True
                    pieces.popleft()
                    chunk.former_key = self._resident_keys.pop(chunk.address, None)
                    return chunk
            except BaseException:
                self.release(chunk)
                raise

    def _touch(self, chunk: StagingChunk) -> None:
        """A chunk for which it fails stays cold."""
        if self.pinning is not None and self.pinning.needs_own_memory:
            self._replace(chunk, self.pinning.allocate(self.chunk_bytes))
        elif not populate(chunk.address, self.chunk_bytes):
            chunk.tensor.zero_()
        if self.pinning is not None:
            self.pinning.register(chunk.address, self.chunk_bytes)
        self._ready.add(chunk.address)

    def _replace(self, chunk: StagingChunk, memory: torch.Tensor) -> None:
        """Give `chunk` other memory; what it had was never touched."""
        with self._lock:
            old = chunk.address
            chunk.piece = memory, view_at(memory.data_ptr(), self.chunk_bytes, owner=memory), memory.data_ptr()
            chunk.tensor, chunk.view, chunk.address = chunk.piece
            self._holders[chunk.address] = weakref.ref(chunk)
            self._pieces[chunk.address] = chunk.piece
            del self._pieces[old], self._holders[old]


def _unpin(pinning: Pinning | None, addresses: set[int], pid: int) -> None:
    if pinning is not None and os.getpid() == pid:
        pinning.unregister(*addresses)
