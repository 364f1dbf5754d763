"""A file cut into chunks, as plain data: every piece of every chunk, and where its bytes come from. No torch here: modes and default
devices of the user's must not reach it.

The pieces of a chunk tile it. There may be tens of thousands of them, and their addresses are worked out anew for each save, so the
small ones are columns of numbers and no objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate

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


@dataclass(frozen=True, slots=True)
class SmallPieces:
    """As `LargePiece`, all small ones of a file in columns; those of chunk k are rows `starts[k]` to `starts[k + 1]`."""

    sources: list[int] = field(default_factory=list)
    source_offsets: list[int] = field(default_factory=list)
    chunk_offsets: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])

    def add(self, source: int, source_offset: int, chunk_offset: int, nbytes: int) -> None:
        """Append a row."""
        self.sources.append(source)
        self.source_offsets.append(source_offset)
        self.chunk_offsets.append(chunk_offset)
        self.nbytes.append(nbytes)

    def addresses(self, sources: list[int]) -> list[int]:
        """Of each row's bytes, where `sources` are the addresses of all sources."""
        return [sources[source] + offset for source, offset in zip(self.sources, self.source_offsets, strict=True)]

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
    """Cut a plan at chunk boundaries: about two microseconds per payload."""
    payloads = enumerate(zip(plan.payload_offsets, plan.payload_nbytes, strict=True))
    extents = sorted([*_literal_extents(plan), *((offset, nbytes, index, 0) for index, (offset, nbytes) in payloads)])
    small = SmallPieces()
    large: list[list[LargePiece]] = [[] for _ in range(max(1, -(-plan.file_bytes // chunk_bytes)))]
    for offset, nbytes, source, source_start in extents:
        done = 0
        while done < nbytes:
            k, chunk_offset = divmod(offset + done, chunk_bytes)
            size = min(nbytes - done, chunk_bytes - chunk_offset)
            while len(small.starts) <= k:
                small.starts.append(len(small.nbytes))
            if size >= LARGE_BYTES:
                large[k].append(LargePiece(source, source_start + done, chunk_offset, size))
            else:
                small.add(source, source_start + done, chunk_offset, size)
            done += size
    while len(small.starts) <= len(large):
        small.starts.append(len(small.nbytes))
    middle = b"".join(data for _, data in plan.literals[1:-1])
    return Cuts(plan.file_bytes, chunk_bytes, len(plan.payload_offsets), small, large, middle)


def _literal_extents(plan: FilePlan) -> list[tuple[int, int, int, int]]:
    """(file offset, bytes, source, offset in the source) of each literal."""
    first, middle, last = range(len(plan.payload_offsets), len(plan.payload_offsets) + 3)
    between = plan.literals[1:-1]
    starts = list(accumulate([len(data) for _, data in between], initial=0))
    extents = [(offset, len(data), middle, start) for (offset, data), start in zip(between, starts, strict=False)]
    ends = [(plan.literals[0], first), (plan.literals[-1], last)][: len(plan.literals)]
    return [*extents, *((offset, len(data), source, 0) for (offset, data), source in ends)]
