"""Content probes: a few bytes of each payload, noted in `save`, which what was copied of it must hold.

Version counters do not move for fused optimizers, BatchNorm statistics and writes through ``.data``. Probes see every change of a whole
tensor, by whatever means: at the head and the tail of each payload, and at regular distances between them. What a change in
the middle of a large tensor leaves alone at all of them, they do not see.

Noting costs one gather over addresses, about 25 ns per probe: a read of one cache line.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

PROBE_BYTES = 8
TINY_BYTES = 1024
# Between the probes of one payload; more where there would be more than so many beside the heads and the tails.
_MIN_DISTANCE_BYTES = 64 << 10
_MAX_INNER_PROBES = 1024

# The whole address space; torch takes no tensor at address 0.
_BASE = 4096
_ADDRESS_SPACE = (ctypes.c_ubyte * (1 << 56)).from_address(_BASE)
_NOWHERE = torch.zeros(PROBE_BYTES, dtype=torch.uint8)
"""Read in place of what lies on a device."""


class ProbeMap:
    """Where the probes of one layout lie, in the payloads and in the chunks; and which payloads are too short for them."""

    def __init__(self, file_offsets: Sequence[int], nbytes: Sequence[int], chunk_bytes: int, num_chunks: int) -> None:
        distance = max(_MIN_DISTANCE_BYTES, sum(nbytes) // _MAX_INNER_PROBES // PROBE_BYTES * PROBE_BYTES)
        self.tiny = [payload for payload, size in enumerate(nbytes) if size <= TINY_BYTES]
        """The numbers of the payloads that have no probes: to copy them costs little more than to look at them."""
        self.tiny_nbytes = [nbytes[payload] for payload in self.tiny]
        self._payloads, self._payload_offsets, chunk_offsets = array("q"), array("q"), array("q")
        self._starts: list[int] = []
        for payload, (start, size) in enumerate(zip(file_offsets, nbytes, strict=True)):
            if size <= TINY_BYTES:
                continue
            # Whole words from where the payload begins, so that the last one is as aligned as the first.
            tail = (size - PROBE_BYTES) // PROBE_BYTES * PROBE_BYTES
            for offset in (*range(0, tail, distance), tail):
                k, chunk_offset = divmod(start + offset, chunk_bytes)
                if chunk_offset <= chunk_bytes - PROBE_BYTES:
                    self._begin(k)
                    self._payloads.append(payload)
                    self._payload_offsets.append(offset)
                    chunk_offsets.append(chunk_offset)
        self._begin(num_chunks)
        with _plain_torch():
            self._columns = tuple(map(_numbers, (self._payloads, self._payload_offsets, chunk_offsets)))
        self._last: tuple[list[int], _Words] | None = None
        """The payloads' addresses of the last save, and the probes of those: nearly always the next one has the same."""

    def _begin(self, k: int) -> None:
        while len(self._starts) <= k:
            self._starts.append(len(self._payloads))

    def note(self, addresses: list[int], unread: frozenset[int]) -> Probes:
        """Read the probes now. One thread at a time.

        Args:
            addresses: of the payloads; 0 for those that lie on a device.
            unread: the numbers of those.
        """
        with _plain_torch():
            if self._last is None or self._last[0] != addresses:
                payloads, offsets, _ = self._columns
                starts = _numbers(array("q", addresses)).index_select(0, payloads)
                self._last = addresses, _Words(torch.where(starts == 0, _NOWHERE.data_ptr(), starts + offsets))
            return Probes(self, self._last[1].read(), unread)

    def rows(self, k: int) -> slice:
        """The probes of chunk `k`."""
        return slice(self._starts[k], self._starts[k + 1])

    def place(self, row: int) -> tuple[int, int]:
        """The payload of a probe, and its offset in that."""
        return self._payloads[row], self._payload_offsets[row]

    def read_chunk(self, k: int, chunk_address: int) -> torch.Tensor:
        """The probes' bytes as they are in chunk `k`."""
        return _Words(self._columns[2][self.rows(k)] + chunk_address).read()


class Probes:
    """What one save has noted."""

    def __init__(self, where: ProbeMap, words: torch.Tensor, unread: frozenset[int]) -> None:
        self._where = where
        self._words = words
        self._unread = unread
        self.changed: list[tuple[int, int]] = []
        """Where a chunk held something else: payload and offset in it."""

    def compare(self, k: int, chunk_address: int) -> None:
        """Compare chunk `k`, which has been filled, with what was noted. Any thread; about 10 us."""
        rows = self._where.rows(k)
        if rows.start == rows.stop:
            return
        with _plain_torch():
            noted, found = self._words[rows], self._where.read_chunk(k, chunk_address)
            if torch.equal(noted, found):
                return
            places = [self._where.place(rows.start + int(row)) for row in torch.nonzero(noted != found)]
        self.changed += [place for place in places if place[0] not in self._unread]


def _numbers(column: array[int]) -> torch.Tensor:
    return torch.frombuffer(column, dtype=torch.int64) if column else torch.empty(0, dtype=torch.int64)


class _Words:
    """The eight bytes at each of some addresses, each as one number."""

    def __init__(self, addresses: torch.Tensor) -> None:
        self._is_aligned = not bool((addresses & (PROBE_BYTES - 1)).any())
        if self._is_aligned:
            self._indices = (addresses - _BASE) >> 3
        else:
            self._indices = ((addresses - _BASE)[:, None] + torch.arange(PROBE_BYTES)).flatten()

    def read(self) -> torch.Tensor:
        memory = torch.frombuffer(_ADDRESS_SPACE, dtype=torch.int64 if self._is_aligned else torch.uint8)
        return memory.index_select(0, self._indices).view(torch.int64)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Without the modes and default devices of the user."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.inference_mode(False):
        yield
