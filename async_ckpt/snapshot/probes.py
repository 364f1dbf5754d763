"""Content probes: a few bytes of each payload, noted in `save`, which what was copied of it must hold.

Version counters do not move for fused optimizers, BatchNorm statistics and writes through ``.data``. Probes see every
change of a whole tensor, by whatever means: at the head and the tail of each payload, and at regular distances between
them. What a change in the middle of a large tensor leaves alone at all of them, they do not see.

Noting is one gather over addresses, about 25 ns per probe: a read of one cache line.
"""

from __future__ import annotations

import copy
import ctypes
import sys
from array import array
from collections.abc import Iterable
from itertools import pairwise

import torch

from ..host.device import plain_torch
from ..plan.plan import FilePlan
from ..plan.strided import Strided

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

    Payloads of up to `TINY_BYTES` are probed as a whole: what is noted of them is their copy. Each probe of a strided
    one is an element, or its first eight bytes. (Where what is written is the conjugate, or the negative, of what lies
    there, there are none.)
    """

    def __init__(self, plan: FilePlan, chunk_bytes: int, num_chunks: int) -> None:
        nbytes, strided = plan.payload_nbytes, plan.strided
        distance = max(_MIN_DISTANCE_BYTES, sum(nbytes) // _MAX_INNER_PROBES // PROBE_BYTES * PROBE_BYTES)
        self._payloads, self._offsets, widths, chunk_offsets = array("q"), array("q"), array("q"), array("q")
        starts: list[int] = []
        """Of the probes in each chunk."""
        self.tiny: list[tuple[int, int]] = []
        """The payloads that are copied by being noted, and the row of the first probe of each."""
        for payload, (start, size) in enumerate(zip(plan.payload_offsets, nbytes, strict=True)):
            layout = strided.get(payload)
            if size <= TINY_BYTES if layout is None else not is_probed(layout):
                continue
            # Whole words from where the payload begins, so that the last one is as aligned as the first.
            step = PROBE_BYTES if layout is None else layout.dtype.itemsize
            tail = (size - step) // step * step
            for offset in (*range(0, tail, distance // step * step), tail):
                k, chunk_offset = divmod(start + offset, chunk_bytes)
                if chunk_offset <= chunk_bytes - PROBE_BYTES:
                    starts += [len(self._payloads)] * (k + 1 - len(starts))
                    self._add(payload, [offset if layout is None else layout.displacement(offset // step)])
                    widths.append(min(step, PROBE_BYTES))
                    chunk_offsets.append(chunk_offset)
        starts += [len(self._payloads)] * (num_chunks + 1 - len(starts))
        self._rows = [slice(first, last) for first, last in pairwise(starts)]
        """Of each chunk."""
        for payload, size in enumerate(nbytes):
            if size <= TINY_BYTES and payload not in strided:
                self.tiny.append((payload, len(self._payloads)))
                self._add(payload, range(0, size, PROBE_BYTES))
        widths.extend([PROBE_BYTES] * (len(self._payloads) - len(widths)))
        probes = zip(self._payloads, self._offsets, widths, strict=True)
        ends = [offset + width if payload in strided else nbytes[payload] for payload, offset, width in probes]
        with plain_torch():
            self._columns = _numbers(self._payloads), _numbers(self._offsets), _numbers(array("q", ends)) - 1
            self._widths = _numbers(widths) if strided else None
            places = _numbers(chunk_offsets)
            self._in_chunks = [
                _words_at(places[rows], None, None if self._widths is None else self._widths[rows])
                for rows in self._rows
            ]
            """The probes in the memory of each chunk."""
        self._last: tuple[list[int], _Words] | None = None
        """The payloads' addresses of the last save, and their probes: nearly always the next one has the same."""

    def _add(self, payload: int, offsets: Iterable[int]) -> None:
        self._offsets.extend(offsets)
        self._payloads.extend([payload] * (len(self._offsets) - len(self._payloads)))

    def note(self, addresses: list[int]) -> torch.Tensor:
        """The probes' bytes now, at these addresses of the payloads (0 for those on a device). One thread at a time."""
        with plain_torch():
            if self._last is None or self._last[0] != addresses:
                payloads, offsets, ends = self._columns
                starts = _numbers(array("q", addresses)).index_select(0, payloads)
                places = torch.where(starts == 0, _NOWHERE.data_ptr(), starts + offsets) - _BASE
                self._last = addresses, _words_at(places, ends - offsets, self._widths)
            return _read(torch.frombuffer(_ADDRESS_SPACE, dtype=torch.uint8), self._last[1])

    def part(self, chunks: slice) -> ProbeMap:
        """With those chunks alone."""
        part = copy.copy(self)
        part._rows, part._in_chunks = self._rows[chunks], self._in_chunks[chunks]
        return part

    def changed(self, noted: torch.Tensor, k: int, chunk: torch.Tensor) -> list[tuple[int, int]]:
        """Where chunk `k`, whose bytes are `chunk` now, holds something else than was noted: payload and offset in it.
        Any thread; about 10 us."""
        rows = self._rows[k]
        if rows.start == rows.stop:
            return []
        with plain_torch():
            found = _read(chunk, self._in_chunks[k])
            if torch.equal(noted[rows], found):
                return []
            changed = (rows.start + int(row) for row in torch.nonzero(noted[rows] != found))
            return [(self._payloads[row], self._offsets[row]) for row in changed]


_Words = tuple[torch.Tensor, torch.dtype, torch.Tensor, torch.Tensor | None]
"""Eight bytes each: indices into some memory, of whole words where none of the probes goes beyond an aligned one,
else of bytes; the bits of each word before the probe, and a mask of the probe where some are narrower."""


def _words_at(addresses: torch.Tensor, last: torch.Tensor | None, widths: torch.Tensor | None) -> _Words:
    """`widths` bytes (None: eight) at each of `addresses`; nothing is read behind the `last` byte (None: there are
    eight), counted from there."""
    before = addresses & (PROBE_BYTES - 1)
    mask = None
    # An aligned word lies in one page, whatever of it belongs to the payload.
    if widths is None:
        is_whole = not bool(before.any())
    else:
        is_whole = bool((before + widths <= PROBE_BYTES).all())
        mask = torch.where(widths == PROBE_BYTES, -1, (1 << 8 * widths) - 1)
    if is_whole:
        return addresses >> 3, torch.int64, 8 * before, mask
    places = torch.arange(PROBE_BYTES) if last is None else torch.minimum(torch.arange(PROBE_BYTES), last[:, None])
    return (addresses[:, None] + places).flatten(), torch.uint8, torch.zeros_like(before), mask


def _read(memory: torch.Tensor, words: _Words) -> torch.Tensor:
    """What is there now, as numbers."""
    indices, dtype, before, mask = words
    found = memory.view(dtype).index_select(0, indices).view(torch.int64)
    return found if mask is None else (found >> before) & mask


def is_probed(layout: Strided) -> bool:
    # A narrow probe is the low bytes of a word.
    return not (layout.is_conj or layout.is_neg) and sys.byteorder == "little"


def _numbers(column: array[int]) -> torch.Tensor:
    return torch.frombuffer(column, dtype=torch.int64) if column else torch.empty(0, dtype=torch.int64)
