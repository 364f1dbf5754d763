"""Fills in what depends on payload bytes, in one pass over a file's extents: record CRCs and the serialization id.

Guarantees:
- Extents come in file order and may be cut anywhere, even inside a CRC field.
- Each payload byte is read once; short payloads and the literals between them are read a second time while still in
  cache, which is cheaper than combining CRCs.
- No Python work longer than about a millisecond without giving other threads a chance to run (a CRC of more than 5 KiB
  is one).
"""

from __future__ import annotations

import struct
import time
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import add, sub

from .checksum import crc32, crc32_combine
from .zip import SERIALIZATION_ID_NBYTES, Container, SealMap
from .zip_directory import DESCRIPTOR_MAGIC

_UINT64_MASK = (1 << 64) - 1
_put_u32 = struct.Struct("<I").pack_into
_COMBINE_FROM_NBYTES = 128 << 10
"""A payload this long is folded in by CRC combination (about 1 us) instead of being read again."""
_RUN_NBYTES = 512 << 10
"""Short payloads in a row are looked at together, as many as stay in a core's cache."""
_RUN_LENGTH = 512
_COPY_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Sealed:
    """The payloads of a file, by number; all of them once it is finished."""

    crcs: Sequence[int]
    slips: Mapping[int, int]


class Sealer:
    """`sealer(offset, view)` makes one extent final and returns its CRC-32; call it for every extent of one file, in
    order.

    One thread at a time; does not block on I/O. `view` must be writable, of exactly the extent's length, and already
    hold literals and payload bytes. Raises ValueError where an extent does not follow the one before.

    Args:
        container: the file. Without a seal map, its payloads have no CRCs of their own.
        start: of the first extent. What depends on payload bytes before it stays unfinished until all shares of the
            file are `joined`. No payload's first eight bytes lie on both sides of it.
    """

    def __init__(self, container: Container, start: int = 0) -> None:
        self._file_bytes, self._map = container.file_bytes, container.seal_map
        self._offsets, self._nbytes = container.payload_offsets, container.payload_nbytes
        self._tail_offset, self._tail_bytes = container.literals[-1]
        self._container = container
        self._tail: bytearray | None = None
        self._expected = start
        self._first_payload = self._next_payload = payload_at(container, start)
        self._running_crc = 0
        self._head = b""
        self._crcs = [0] * self._first_payload
        self._slips: dict[int, int] = {}
        """By payload, what its head has added to the id, see `_look_at_head`."""
        self.sealed = Sealed(self._crcs, self._slips)
        """What is known of the payloads so far."""
        self._passed: Sealed | None = None
        self._passed_payload = -1
        """The one that a passed extent ends in."""
        self._hash = 0
        self._pending: tuple[int, bytes] | None = None
        if self._map is not None:
            for crc in self._map.crcs_before:
                self._mix(crc)

    def __call__(self, offset: int, view: memoryview) -> int:
        """Patch and checksum the extent that starts at file offset `offset`."""
        end = offset + view.nbytes
        if offset != self._expected or end > self._file_bytes:
            raise ValueError(
                f"extent {offset}..{end} does not follow {self._expected} in a file of {self._file_bytes} bytes"
            )
        self._expected = end
        if self._map is None:
            return crc32(view)
        self._patch(offset, end, view)
        crc, done = self._take_payloads(offset, end, view)
        if self._next_payload == len(self._offsets) and end > self._tail_offset:
            # The finished bytes behind the last payload.
            if self._tail is None:
                self._tail = self._finish_tail(self._map)
            tail = memoryview(self._tail)
            for start in range(max(offset, self._tail_offset), end, _COPY_NBYTES):
                stop = min(start + _COPY_NBYTES, end)
                view[start - offset : stop - offset] = tail[start - self._tail_offset : stop - self._tail_offset]
        return crc32(view[done - offset :], crc)

    @property
    def parts(self) -> list[int] | None:
        """The CRCs of the payloads from `start` to the end of the last extent, of the first and the last perhaps of a
        part; None in a format whose payloads have none.
        """
        if self._map is None:
            return None
        index = self._next_payload
        is_cut = index < len(self._offsets) and self._offsets[index] < self._expected
        return self._crcs[self._first_payload :] + [self._running_crc] * is_cut

    def joined(self, shares: Sequence[tuple[int, int, Sequence[int], Mapping[int, int]]]) -> list[tuple[int, bytes]]:
        """What shares of one file that were sealed each by itself lack, and where it belongs.

        Args:
            shares: all of them in file order: start, end, `parts` and the slips.
        """
        if self._map is None:
            return []
        crcs: list[int] = []
        slips: dict[int, int] = {}
        for start, end, parts, more in shares:
            for index, crc in enumerate(parts, payload_at(self._container, start)):
                if index == len(crcs):
                    crcs.append(crc)
                else:
                    length = min(end, self._offsets[index] + self._nbytes[index]) - start
                    crcs[index] = crc32_combine(crcs[index], crc, length)
            slips.update(more)
        self.pass_over(0, self._file_bytes, Sealed(crcs, slips))
        lacking = [(self._tail_offset, bytes(self._finish_tail(self._map)))]
        for start, *_ in shares[1:]:
            index = bisect_left(self._offsets, start) - 1
            field = self._offsets[index] + self._nbytes[index] + 4 if index >= 0 else 0
            if start < field + 4 <= self._tail_offset:
                lacking.append((field, crcs[index].to_bytes(4, "little")))
        return lacking

    def pass_over(self, offset: int, end: int, earlier: Sealed) -> None:
        """Go on behind an extent that is not here: it holds no literal but those between payloads, and its bytes are
        those of an `earlier` file of this layout.
        """
        self._expected, self._passed, self._head = end, earlier, b""
        if self._map is None:
            return
        self._patch(offset, end, None)
        while self._next_payload < len(self._offsets) and self._offsets[self._next_payload] < end:
            index = self._next_payload
            start, payload_end = self._offsets[index], self._offsets[index] + self._nbytes[index]
            # Unless its head was seen in an extent before.
            if index != self._passed_payload and start + 8 > offset and index in earlier.slips:
                self._mix(earlier.slips[index])
            self._passed_payload = index
            if payload_end > end:
                break
            self._end_payload(payload_end)
            self._patch(offset, end, None)
            self._next_payload = index + 1

    def _end_payload(self, payload_end: int) -> None:
        crc = self._running_crc
        if self._passed is not None and len(self._crcs) == self._passed_payload:
            crc = self._passed.crcs[self._passed_payload]
        self._crcs.append(crc)
        self._mix(crc)
        if payload_end < self._tail_offset:
            self._pending = (payload_end + 4, crc.to_bytes(4, "little"))

    def _take_payloads(self, offset: int, end: int, view: memoryview) -> tuple[int, int]:
        """Checksum the payload parts in this extent; returns the CRC of its bytes before the second result."""
        offsets, sizes = self._offsets, self._nbytes
        index, count = self._next_payload, len(self._offsets)
        crc, done = 0, offset
        while index < count and offsets[index] < end:
            behind = self._run_end(index, offset, end)
            if behind > index:
                behind = self._take_run(index, behind, offset, view)
            if behind > index:
                past = offsets[behind - 1] + sizes[behind - 1] + 8
                crc, done, index = crc32(view[done - offset : past - offset], crc), past, behind
                continue
            payload_start = offsets[index]
            payload_end = payload_start + sizes[index]
            start, stop = max(payload_start, offset), min(payload_end, end)
            part = crc32(view[start - offset : stop - offset])
            crc, done = crc32_combine(crc32(view[done - offset : start - offset], crc), part, stop - start), stop
            if start == payload_start:
                self._running_crc = part
                self._head = b""
            else:
                self._running_crc = crc32_combine(self._running_crc, part, stop - start)
            self._look_at_head(start - payload_start, view[start - offset : min(start + 8, stop) - offset])
            if stop < payload_end:
                break
            self._end_payload(payload_end)
            self._patch(offset, end, view)
            index += 1
        self._next_payload = index
        return crc, done

    def _run_end(self, index: int, offset: int, end: int) -> int:
        """Where the run of short payloads ends that begins with payload `index`, all in this extent."""
        offsets, sizes = self._offsets, self._nbytes
        if offsets[index] < offset:
            return index
        # The last payload's descriptor is in the tail.
        stop = min(len(offsets) - 1, index + _RUN_LENGTH)
        stop = bisect_left(offsets, min(end, offsets[index] + _RUN_NBYTES), index, max(index, stop))
        if stop > index and offsets[stop - 1] + sizes[stop - 1] + 8 > end:
            stop -= 1
        long = (i for i in range(index, stop) if sizes[i] >= _COMBINE_FROM_NBYTES)
        return stop if max(sizes[index:stop], default=0) < _COMBINE_FROM_NBYTES else next(long)

    def _take_run(self, index: int, stop: int, offset: int, view: memoryview) -> int:
        """Checksum a run and patch its descriptors; returns the index behind it. A payload that may be taken for a
        descriptor ends it.
        """
        starts = list(map(sub, self._offsets[index:stop], repeat(offset)))
        suspect = bytes(map(view.__getitem__, starts)).find(DESCRIPTOR_MAGIC[0])
        if suspect >= 0:
            del starts[suspect:]
            stop = index + suspect
        sizes = self._nbytes[index:stop]
        ends = list(map(add, starts, sizes))
        crcs = list(map(crc32, map(view.__getitem__, map(slice, starts, ends))))
        deque(map(_put_u32, repeat(view), map(add, ends, repeat(4)), crcs), maxlen=0)
        self._crcs += crcs
        value = self._hash
        for crc in crcs:
            value ^= (crc + 0x9E3779B9 + (value << 6) + (value >> 2)) & _UINT64_MASK
        self._hash = value
        return stop

    def _look_at_head(self, position: int, head: memoryview) -> None:
        # torch's writer takes every write that starts like a data descriptor for one and mixes the four bytes behind
        # the magic into the id, also when it is a payload. The same id needs the same slip.
        if position >= 8 or (position == 0 and head[0] != DESCRIPTOR_MAGIC[0]):
            return
        if position == len(self._head):
            self._head += bytes(head[: 8 - position])
            if len(self._head) == 8 and self._head.startswith(DESCRIPTOR_MAGIC):
                self._slips[len(self._crcs)] = slip = int.from_bytes(self._head[4:], "little")
                self._mix(slip)

    def _patch(self, offset: int, end: int, view: memoryview | None) -> None:
        """Write the part of the pending descriptor CRC that lies in this extent, if its bytes are here."""
        if self._pending is None or self._pending[0] >= end:
            return
        at, data = self._pending
        part, rest = data[: end - at], data[end - at :]
        if view is not None:
            view[at - offset : at - offset + len(part)] = part
        self._pending = (end, rest) if rest else None

    def _mix(self, crc: int) -> None:
        value = self._hash
        self._hash = value ^ ((crc + 0x9E3779B9 + (value << 6) + (value >> 2)) & _UINT64_MASK)

    def _finish_tail(self, seal_map: SealMap) -> bytearray:
        tail, base = bytearray(self._tail_bytes), self._tail_offset
        if self._crcs:
            _put_u32(tail, 4, self._crcs[-1])
        for low in range(0, len(self._crcs), 8 * _RUN_LENGTH):
            part = slice(low, low + 8 * _RUN_LENGTH)
            places = map(sub, seal_map.entry_crc_offsets[part], repeat(base))
            deque(map(_put_u32, repeat(tail), places, self._crcs[part]), maxlen=0)
            time.sleep(0)
        for crc in seal_map.crcs_after:
            self._mix(crc)
        digits = seal_map.name_hash + b"%020d" % self._hash
        tail[seal_map.id_offset - base : seal_map.id_offset - base + SERIALIZATION_ID_NBYTES] = digits
        for at in seal_map.id_crc_offsets:
            _put_u32(tail, at - base, crc32(digits))
        return tail


def payload_at(container: Container, at: int) -> int:
    """The number of the first payload that ends behind `at`."""
    offsets, nbytes = container.payload_offsets, container.payload_nbytes
    before = bisect_right(offsets, at) - 1
    return before + 1 if before < 0 or offsets[before] + nbytes[before] <= at else before
