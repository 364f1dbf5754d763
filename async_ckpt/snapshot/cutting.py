"""A file cut into chunks, as plain data: every piece of every chunk, and where its bytes come from.

The pieces of a chunk tile it. There may be tens of thousands of them, and their addresses are worked out anew for each save, so
they are columns of int64 and no Python objects.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

import torch

from ..layout import FilePlan

# From here on a piece is worth a call of its own.
LARGE_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class LargePiece:
    """`nbytes` bytes of `source`, from `source_offset`, belong at `chunk_offset`."""

    source: int
    source_offset: int
    chunk_offset: int
    nbytes: int


class SmallPieces:
    """As `LargePiece`, all small ones of a file in columns; those of chunk k are rows `starts[k]` to `starts[k + 1]`."""

    def __init__(self, columns: torch.Tensor, starts: list[int]) -> None:
        self.starts = starts
        self._sources, self._source_offsets = columns[:, 0].contiguous(), columns[:, 1].contiguous()
        self.sources, self.source_offsets, self.chunk_offsets, self.nbytes = (column.tolist() for column in columns.unbind(1))

    def addresses(self, sources: list[int]) -> list[int]:
        """Of each row's bytes, where `sources` are the addresses of all sources."""
        found: list[int] = (torch.tensor(sources, dtype=torch.int64, device="cpu")[self._sources] + self._source_offsets).tolist()
        return found

    def rows(self, k: int) -> range:
        """Of chunk `k`."""
        return range(self.starts[k], self.starts[k + 1])


@dataclass(frozen=True, slots=True)
class Cuts:
    """The chunks of one layout.

    A source is a payload by its number, or a literal: the file's first one is source `num_payloads`, all between the first and
    the last joined are the next, the last is the one after. (The first and the last may differ between plans of one layout.)
    """

    file_bytes: int
    chunk_bytes: int
    num_payloads: int
    small: SmallPieces
    large: list[list[LargePiece]]
    """Per chunk."""
    middle: bytes

    def __len__(self) -> int:
        return len(self.large)

    def offset(self, k: int) -> int:
        """Of chunk `k` in the file."""
        return k * self.chunk_bytes

    def nbytes(self, k: int) -> int:
        """Of chunk `k`."""
        return min(self.chunk_bytes, self.file_bytes - k * self.chunk_bytes)


def literal_sources(plan: FilePlan, cuts: Cuts) -> list[bytes]:
    """The bytes of `plan` that are sources of their own, in the order of their numbers."""
    return [plan.literals[0][1], cuts.middle, plan.literals[-1][1]]


def cut(plan: FilePlan, chunk_bytes: int) -> Cuts:
    """Cut a plan at chunk boundaries: about a microsecond per payload."""
    num_chunks = max(1, -(-plan.file_bytes // chunk_bytes))
    payloads = [
        (offset, nbytes, index, 0) for index, (offset, nbytes) in enumerate(zip(plan.payload_offsets, plan.payload_nbytes, strict=True))
    ]
    extents = torch.tensor(sorted([*payloads, *_literal_extents(plan)]), dtype=torch.int64).reshape(-1, 4)
    offsets, nbytes, sources, source_starts = extents[extents[:, 1] > 0].unbind(1)
    first_chunks = offsets // chunk_bytes
    num_parts = (offsets + nbytes - 1) // chunk_bytes - first_chunks + 1
    part_of = torch.repeat_interleave(torch.arange(len(offsets), device="cpu"), num_parts)
    # The number of each part among those of its extent: counted on from where the extent's parts begin.
    number = torch.arange(len(part_of), device="cpu") - (num_parts.cumsum(0) - num_parts)[part_of]
    chunks = first_chunks[part_of] + number
    lows = torch.maximum(offsets[part_of], chunks * chunk_bytes)
    sizes = torch.minimum((offsets + nbytes)[part_of], (chunks + 1) * chunk_bytes) - lows
    columns = torch.stack((sources[part_of], source_starts[part_of] + lows - offsets[part_of], lows - chunks * chunk_bytes, sizes), 1)
    is_large = sizes >= LARGE_BYTES
    large: list[list[LargePiece]] = [[] for _ in range(num_chunks)]
    for k, piece in zip(chunks[is_large].tolist(), columns[is_large].tolist(), strict=True):
        large[k].append(LargePiece(*piece))
    small_chunks = chunks[~is_large].tolist()
    small = SmallPieces(columns[~is_large], [bisect_left(small_chunks, k) for k in range(num_chunks + 1)])
    middle = b"".join(data for _, data in plan.literals[1:-1])
    return Cuts(plan.file_bytes, chunk_bytes, len(plan.payload_offsets), small, large, middle)


def _literal_extents(plan: FilePlan) -> list[tuple[int, int, int, int]]:
    """(file offset, bytes, source, offset in the source) of each literal."""
    first, middle, last = range(len(plan.payload_offsets), len(plan.payload_offsets) + 3)
    between = plan.literals[1:-1]
    starts = accumulate((len(data) for _, data in between), initial=0)
    extents = [(offset, len(data), middle, start) for (offset, data), start in zip(between, starts, strict=False)]
    ends = [(plan.literals[0], first), (plan.literals[-1], last)][: len(plan.literals)]
    return [*extents, *((offset, len(data), source, 0) for (offset, data), source in ends)]
