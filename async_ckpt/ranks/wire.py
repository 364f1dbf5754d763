"""Pieces of a file, from the rank that reads it to others: between hosts over a gloo group of the first rank of each,
within a host through memory that its ranks share.

Guarantees:
- A piece has at most `PIECE_BYTES`. A host's memory is `NUM_PIECES` of them; where ranks share it, it has no name, is
  no part of /dev/shm, only processes of the same user are given it, and it goes with the last of them.
- Within a host nothing is copied on the way: threads read into the shared memory, every rank takes what it needs out of
  it, and a place is read into again when all have. Nobody waits for that while another place is free.
- A rank that dies is noticed by the others of its host at once, one that stands still after `timeout_s`.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..host.memory import address_of, region, shared_region
from ..host.process import current_owner
from ..threads.locks import Lock

PIECE_BYTES = 2 << 20
NUM_PIECES = 16
"""More than threads read, so that they go on while pieces are being taken."""
_END, _FAILED = -1, -2
_HEADER = struct.Struct("<qqq")
"""A piece's offset in the file, its size, its place in the shared memory."""


class LostError(Exception):
    """Another rank is to blame for what failed here."""


def host_key() -> str:
    """Equal on ranks that can share memory; "" on one that cannot."""
    try:
        os.close(os.memfd_create("async_ckpt"))
        network = os.stat("/proc/self/ns/net").st_ino
    except (AttributeError, OSError):
        return ""
    me = current_owner()
    return f"{me.host}-{me.boot}-{network}-{os.geteuid()}"


class Wire:
    """A link from the first of some ranks to the others. `send` is called by many threads, the rest by one.

    All ranks `connect` once all are made. Whatever fails in between, in `close` too, is a LostError.
    """

    def __init__(self, name: str, hosts: Sequence[Sequence[int]], rank: int, timeout_s: float) -> None:
        self._name = name
        self._firsts = [ranks[0] for ranks in hosts]
        self._rank = rank
        self._mine = next(ranks for ranks in hosts if rank in ranks)
        self._timeout_s = timeout_s
        self._lock, self._place_lock = Lock(), Lock()
        self._group: Any = None
        self._memory = memoryview(b"")
        self._free = list(range(NUM_PIECES))
        """Places in the memory."""
        self._given: deque[int] = deque()
        """Places of pieces that the host's others may be taking, in the order in which they all take them."""
        self._sockets: list[socket.socket] = []
        """To the host's others; of those, to the first one."""
        self._is_closed = False
        self._listener: socket.socket | None = None
        if rank == self._mine[0] and len(self._mine) > 1:
            self._listener = self._socket()
            self._listener.bind(self._address)
            self._listener.listen(len(self._mine))

    @property
    def _address(self) -> str:
        return f"\0async_ckpt/{self._name}/{self._mine[0]}"

    def _socket(self) -> socket.socket:
        made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        made.settimeout(self._timeout_s)
        return made

    def connect(self) -> None:
        """Blocks until all ranks do."""
        with self._losing():
            if self._rank != self._mine[0]:
                self._join()
                return
            if self._listener is not None:
                self._accept(self._listener)
            else:
                self._memory = region(NUM_PIECES * PIECE_BYTES)
            if len(self._firsts) > 1:
                # Of its own, by a name of its own: whatever becomes of it, the training's groups are as before.
                store = dist.PrefixStore(f"async_ckpt/{self._name}", dist.distributed_c10d._get_default_store())
                number, patience = self._firsts.index(self._rank), timedelta(seconds=self._timeout_s)
                self._group = dist.ProcessGroupGloo(store, number, len(self._firsts), patience)

    def _accept(self, listener: socket.socket) -> None:
        fd = os.memfd_create("async_ckpt")
        try:
            os.ftruncate(fd, NUM_PIECES * PIECE_BYTES)
            self._memory = shared_region(fd, NUM_PIECES * PIECE_BYTES)
            while len(self._sockets) < len(self._mine) - 1:
                other, _ = listener.accept()
                if not _is_same_user(other):
                    other.close()
                    continue
                self._sockets.append(other)
                other.settimeout(self._timeout_s)
                socket.send_fds(other, [b"."], [fd])
        finally:
            os.close(fd)
        listener.close()

    def _join(self) -> None:
        first = self._socket()
        self._sockets.append(first)
        first.connect(self._address)
        _, fds, _, _ = socket.recv_fds(first, 1, 1)
        if not (fds and _is_same_user(first)):
            raise ConnectionError("it gave no memory")
        try:
            self._memory = memoryview(mmap.mmap(fds[0], 0))
        finally:
            os.close(fds[0])

    def place(self, num_bytes: int) -> memoryview:
        """Memory to `send` a piece from, once. Blocks where all is in use, until the host's others have taken the
        oldest piece."""
        with self._losing(), self._place_lock:
            if self._free:
                number = self._free.pop()
            else:
                for other in self._sockets:
                    if not other.recv(1):
                        raise ConnectionError("a rank of this host has gone")
                number = self._given.popleft()
        return self._memory[number * PIECE_BYTES :][:num_bytes]

    def send(self, offset: int, view: memoryview, take: Callable[[int, memoryview], None] | None = None) -> None:
        """Give a piece to the others, once `take` has had it here; one that is in no `place` is copied into one."""
        if not 0 <= address_of(view) - address_of(self._memory) < len(self._memory):
            place = self.place(view.nbytes)
            place[:] = view
            view = place
        if take is not None:
            take(offset, view)
        with self._losing(), self._lock:
            self._give(offset, view)
            self._broadcast(torch.tensor([offset, view.nbytes], device="cpu"))
            self._broadcast(torch.frombuffer(view, dtype=torch.uint8) if self._group is not None else None)

    def end(self, *, failed: bool = False) -> None:
        """Nothing follows."""
        how = _FAILED if failed else _END
        with self._losing(), self._lock:
            self._give(how)
            self._broadcast(torch.tensor([how, 0], device="cpu"))

    def receive(self) -> Iterator[tuple[int, memoryview]]:
        """Offsets and bytes, which are valid until the next; raises LostError where the sender says so."""
        how = yield from self._received_near() if self._rank != self._mine[0] else self._received_far()
        if how == _FAILED:
            raise LostError("the rank that reads has failed")

    def _received_near(self) -> Generator[tuple[int, memoryview], None, int]:
        (first,) = self._sockets
        while True:
            with self._losing():
                header = first.recv(_HEADER.size)
                if not header:
                    raise ConnectionError("the host's first rank has gone")
            offset: int
            offset, num_bytes, place = _HEADER.unpack(header)
            if not num_bytes:
                return offset
            yield offset, self._memory[place:][:num_bytes]
            with self._losing():
                first.send(b".", socket.MSG_NOSIGNAL)

    def _received_far(self) -> Generator[tuple[int, memoryview], None, int]:
        header = torch.zeros(2, dtype=torch.int64, device="cpu")
        while True:
            place = self.place(PIECE_BYTES)
            with self._losing():
                self._broadcast(header)
                offset, num_bytes = (int(number) for number in header.tolist())
                if not num_bytes:
                    self._give(offset)
                    return offset
                self._broadcast(torch.frombuffer(place[:num_bytes], dtype=torch.uint8))
            yield offset, place[:num_bytes]
            with self._losing():
                self._give(offset, place[:num_bytes])

    def _give(self, offset: int, view: memoryview | None = None) -> None:
        """Tell the others of this host about a piece, or that there are no more."""
        at, num_bytes = 0, 0
        if view is not None:
            at, num_bytes = address_of(view) - address_of(self._memory), view.nbytes
            self._given.append(at // PIECE_BYTES)
        for other in self._sockets:
            other.send(_HEADER.pack(offset, num_bytes, at), socket.MSG_NOSIGNAL)

    def _broadcast(self, tensor: torch.Tensor | None) -> None:
        if self._group is not None:
            self._group.broadcast(tensor, 0).wait()

    @contextlib.contextmanager
    def _losing(self) -> Iterator[None]:
        """Let what fails in the block fail as the others having been lost."""
        try:
            if self._is_closed:
                raise ConnectionError("it was given up")
            yield
        except (OSError, RuntimeError) as error:
            self._give_up()
            raise LostError(f"the ranks have lost each other: {error}") from error

    def _give_up(self) -> None:
        """End all that waits, here and there; idempotent. Any thread: descriptors stay, which others may be using."""
        self._group, self._is_closed = None, True
        for opened in self._sockets:
            with contextlib.suppress(OSError):
                opened.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the others, who notice it; idempotent."""
        self._give_up()
        for opened in (self._listener, *self._sockets):
            if opened is not None:
                opened.close()


def _is_same_user(other: socket.socket) -> bool:
    found = other.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", found)[1] == os.geteuid())
