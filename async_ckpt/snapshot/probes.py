"""Content probes: a few bytes of each payload, noted in `save`, which what was copied of it must hold.

Version counters do not move for fused optimizers, BatchNorm statistics and writes through ``.data``. Probes see every
change of a whole tensor, by whatever means: at the head and the tail of each payload, and at regular distances between
them. What a change in the middle of a large tensor leaves alone at all of them, they do not see.

Noting is one gather over addresses, about 25 ns per probe: a read of one cache line.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

PROBE_BYTES = 8
TINY_BYTES = 256
# Between the probes of one payload; more where there would be more than so many beside the heads and the tails.
_MIN_DISTANCE_BYTES = 64 << 10
_MAX_INNER_PROBES = 256

# The whole address space; torch takes no tensor at address 0.
_BASE = 4096
_ADDRESS_SPACE = (ctypes.c_ubyte * (1 << 56)).from_address(_BASE)
_NOWHERE = torch.zeros(1, dtype=torch.int64, device="cpu")
"""Read in place of what lies on a device."""


class ProbeMap:
    """Where the probes of one layout lie, in the payloads and in the chunks.

    Payloads of up to `TINY_BYTES` are probed as a whole: what is noted of them is their copy.
    """

    def __init__(self, file_offsets: Sequence[int], nbytes: Sequence[int], chunk_bytes: int, num_chunks: int) -> None:
        distance = max(_MIN_DISTANCE_BYTES, sum(nbytes) // _MAX_INNER_PROBES // PROBE_BYTES * PROBE_BYTES)
        self._payloads, self._offsets, chunk_offsets = array("q"), array("q"), array("q")
        self._starts: list[int] = []
        self.tiny: list[tuple[int, int]] = []
        """Payloads, and the row of the first probe of each."""
        for payload, (start, size) in enumerate(zip(file_offsets, nbytes, strict=True)):
            if size <= TINY_BYTES:
                continue
            # Whole words from where the payload begins, so that the last one is as aligned as the first.
            tail = (size - PROBE_BYTES) // PROBE_BYTES * PROBE_BYTES
            for offset in (*range(0, tail, distance), tail):
                k, chunk_offset = divmod(start + offset, chunk_bytes)
                if chunk_offset <= chunk_bytes - PROBE_BYTES:
                    self._begin(k)
                    self._add(payload, range(offset, offset + 1))
                    chunk_offsets.append(chunk_offset)
        self._begin(num_chunks)
        for payload, size in enumerate(nbytes):
            if size <= TINY_BYTES:
                self.tiny.append((payload, len(self._payloads)))
                self._add(payload, range(0, size, PROBE_BYTES))
        ends = array("q", [nbytes[payload] - 1 for payload in self._payloads])
        with _plain_torch():
            self._columns = _numbers(self._payloads), _numbers(self._offsets), _numbers(ends)
            self._chunk_offsets = _numbers(chunk_offsets)
        self._last: tuple[list[int], _Words] | None = None
        """The payloads' addresses of the last save, and their probes: nearly always the next one has the same."""

    def _begin(self, k: int) -> None:
        while len(self._starts) <= k:
            self._starts.append(len(self._payloads))

    def _add(self, payload: int, offsets: range) -> None:
        self._payloads.extend([payload] * len(offsets))
        self._offsets.extend(offsets)

    def note(self, addresses: list[int], unread: frozenset[int]) -> Probes:
        """Read the probes now. One thread at a time.

        Args:
            addresses: of the payloads; 0 for those that lie on a device.
            unread: the numbers of those.
        """
        with _plain_torch():
            if self._last is None or self._last[0] != addresses:
                payloads, offsets, ends = self._columns
                starts = _numbers(array("q", addresses)).index_select(0, payloads)
                self._last = addresses, _Words(starts, offsets, ends)
            return Probes(self, self._last[1].read(), unread)

    def rows(self, k: int) -> slice:
        """The probes in chunk `k`."""
        return slice(self._starts[k], self._starts[k + 1])

    def place(self, row: int) -> tuple[int, int]:
        """The payload of a probe, and its offset in that."""
        return self._payloads[row], self._offsets[row]

    def read_chunk(self, k: int, chunk_address: int) -> torch.Tensor:
        """The probes' bytes as they are in chunk `k`."""
        starts, offsets = torch.tensor(chunk_address), self._chunk_offsets[self.rows(k)]
        return _Words(starts, offsets, offsets + PROBE_BYTES).read()


class Probes:
    """What one save has noted."""

    def __init__(self, where: ProbeMap, words: torch.Tensor, unread: frozenset[int]) -> None:
        self._where = where
        self._words = words
        self._unread = unread
        self.changed: list[tuple[int, int]] = []
        """Where a chunk held something else: payload and offset in it."""

    def copies(self) -> list[tuple[int, int]]:
        """The payloads that were copied by being noted, and the address of each copy; valid while this is alive."""
        first = self._words.data_ptr()
        tiny = self._where.tiny
        return [(payload, first + row * PROBE_BYTES) for payload, row in tiny if payload not in self._unread]

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


class _Words:
    """Eight bytes each at `starts` + `offsets`, as numbers; nothing is read beyond `starts` + `ends`. A start may be 0:
    nowhere."""

    def __init__(self, starts: torch.Tensor, offsets: torch.Tensor, ends: torch.Tensor) -> None:
        addresses = torch.where(starts == 0, _NOWHERE.data_ptr(), starts + offsets)
        # An aligned word lies in one page, whatever of it belongs to the payload.
        self._is_aligned = not bool((addresses & (PROBE_BYTES - 1)).any())
        if self._is_aligned:
            self._indices = (addresses - _BASE) >> 3
        else:
            places = torch.minimum(offsets[:, None] + torch.arange(PROBE_BYTES), ends[:, None]) - offsets[:, None]
            self._indices = (addresses[:, None] + places - _BASE).flatten()

    def read(self) -> torch.Tensor:
        memory = torch.frombuffer(_ADDRESS_SPACE, dtype=torch.int64 if self._is_aligned else torch.uint8)
        return memory.index_select(0, self._indices).view(torch.int64)


def _numbers(column: array[int]) -> torch.Tensor:
    return torch.frombuffer(column, dtype=torch.int64) if column else torch.empty(0, dtype=torch.int64)


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Without the modes and default devices of the user."""
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), torch.inference_mode(False):
        yield
