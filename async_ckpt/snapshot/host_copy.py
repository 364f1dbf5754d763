"""Copies by address, of everything that the CPU can read, in loops in C: a tensor costs microseconds.

They release the GIL while they copy, but for small pieces: getting it back takes longer than copying them.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import compress, repeat
from operator import add

from ..host.memory import move_holding_gil, move_releasing_gil
from .arena import StagingChunk
from .chunk_map import ChunkMap
from .payloads import address_of_bytes

# How many small pieces one loop in C copies before a signal is looked at: well under 1 ms, with the GIL held.
_BATCH = 100


class HostSources:
    """Where the sources of one file lie, as far as the CPU can read them. Several threads may fill chunks at once."""

    def __init__(self, chunk_map: ChunkMap, addresses: list[int]) -> None:
        """`addresses`: of all payloads, then of the literals; 0 for what is not copied here."""
        self.addresses = addresses
        self._map = chunk_map
        self._small_addresses: list[int] | None = None

    def fill(self, k: int, chunk: StagingChunk, wanted: list[bool] | None, *, completes: bool, is_urgent: bool) -> None:
        """Copy what is wanted (None: everything) of chunk `k`.

        Args:
            completes: with the literals between payloads.
            is_urgent: somebody waits for it: keep the GIL between small pieces too.
        """
        if completes:
            self._fill_between(k, chunk, is_urgent)
        self._fill_small(k, chunk, wanted, is_urgent)
        for piece in self._map.large[k]:
            source = self.addresses[piece.source]
            if source and (wanted is None or wanted[piece.source]):
                move_releasing_gil(chunk.address + piece.chunk_offset, source + piece.source_offset, piece.nbytes)

    def _fill_small(self, k: int, chunk: StagingChunk, wanted: list[bool] | None, is_urgent: bool) -> None:
        small, addresses = self._map.small, self._small_addresses
        if addresses is None:
            addresses = list(map(add, self._map.pick_small(self.addresses), small.source_offsets))
            self._small_addresses = addresses
        rows = small.rows[k]
        columns = [small.chunk_offsets[rows], addresses[rows], small.nbytes[rows]]
        if wanted is not None:
            chosen = list(map(wanted.__getitem__, small.sources[rows]))
            columns = [list(compress(column, chosen)) for column in columns]
        _copy_rows(chunk.address, *columns, is_urgent=is_urgent)

    def _fill_between(self, k: int, chunk: StagingChunk, is_urgent: bool) -> None:
        """The literals between payloads: they depend on the layout alone, and may be there from the save before."""
        key = (self._map.key, k)
        if chunk.former_key != key:
            between = self._map.between
            rows = between.rows[k]
            addresses = list(map(add, between.source_offsets[rows], repeat(address_of_bytes(self._map.middle))))
            _copy_rows(chunk.address, between.chunk_offsets[rows], addresses, between.nbytes[rows], is_urgent=is_urgent)
        chunk.resident_key = key


def _copy_rows(base: int, offsets: list[int], sources: list[int], nbytes: list[int], *, is_urgent: bool) -> None:
    """Copy `nbytes[i]` bytes from address `sources[i]` to `base + offsets[i]`."""
    for low in range(0, len(nbytes), _BATCH):
        batch = slice(low, low + _BATCH)
        deque(map(move_holding_gil, map(base.__add__, offsets[batch]), sources[batch], nbytes[batch]), maxlen=0)
        if not is_urgent:
            time.sleep(0)
