"""A file cut into chunks, as plain data: every piece of every chunk, and where its bytes come from.

The pieces of a chunk tile it. There may be tens of thousands of them, and their addresses are worked out anew for each
save, so the small ones are columns of numbers and no objects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, count
from typing import Any

from ..host.memory import LONG_BYTES
from ..plan.plan import FilePlan
from ..plan.structure import picker
from .probes import ProbeMap


@dataclass(frozen=True, slots=True)
class LargePiece:
    """`nbytes` bytes of `source`, from `source_offset`, belong at `chunk_offset`."""

    source: int
    source_offset: int
    chunk_offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class SmallPieces:
    """As `LargePiece`, all small ones of a file in columns."""

    sources: list[int] = field(default_factory=list)
    source_offsets: list[int] = field(default_factory=list)
    chunk_offsets: list[int] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    rows: list[slice] = field(default_factory=list)
    """Of each chunk."""

    def add(self, piece: LargePiece) -> None:
        """Append a row to the chunk that is being filled."""
        self.sources.append(piece.source)
        self.source_offsets.append(piece.source_offset)
        self.chunk_offsets.append(piece.chunk_offset)
        self.nbytes.append(piece.nbytes)

    def end(self, num_chunks: int) -> None:
        """So many chunks have all their rows."""
        while len(self.rows) < num_chunks:
            self.rows.append(slice(self.rows[-1].stop if self.rows else 0, len(self.nbytes)))

    def pieces(self, k: int) -> Iterator[LargePiece]:
        rows = self.rows[k]
        return map(
            LargePiece, self.sources[rows], self.source_offsets[rows], self.chunk_offsets[rows], self.nbytes[rows]
        )


@dataclass(frozen=True, slots=True)
class ChunkMap:
    """The chunks of one layout.

    A source is a payload by its number, or a literal: the file's first one is source `num_payloads`, all short ones
    between the first and the last joined are the next, the last is the one after, then come the long ones. (The first
    and the last may differ between plans of one layout.)
    """

    file_bytes: int
    offsets: list[int]
    """Of each chunk, in the file."""
    nbytes: list[int]
    """Of each chunk."""
    num_payloads: int
    small: SmallPieces
    """Of payloads."""
    large: list[list[LargePiece]]
    """Per chunk: of payloads, all of the strided ones, and all of the first, the last and the long literals."""
    between: SmallPieces
    """Of the short literals between them."""
    middle: bytes
    """The source of `between`."""
    key: object
    """Equal for maps with the same `between` and `middle`."""
    probes: ProbeMap
    pick_small: Callable[[Sequence[int]], Sequence[int]]
    """Picks what belongs to each row of `small` from one item per payload."""
    long_literals: list[int]
    """Which of the plan's literals are the long ones."""

    def payload_pieces(self, k: int) -> Iterator[LargePiece]:
        """All pieces of payloads in chunk `k`, one by one."""
        large = (piece for piece in self.large[k] if piece.source < self.num_payloads)
        return chain(large, self.small.pieces(k))

    def part(self, chunks: slice) -> ChunkMap:
        """Those chunks of it alone."""
        small, between = (replace(pieces, rows=pieces.rows[chunks]) for pieces in (self.small, self.between))
        columns: dict[str, Any] = {name: getattr(self, name)[chunks] for name in ("offsets", "nbytes", "large")}
        probes = self.probes.part(chunks)
        return replace(self, **columns, small=small, between=between, probes=probes, key=object())


def map_chunks(plan: FilePlan, chunk_bytes: int) -> ChunkMap:
    """Cut a plan at chunk boundaries: about two microseconds per payload."""
    payloads = enumerate(zip(plan.payload_offsets, plan.payload_nbytes, strict=True))
    extents = sorted([*_literal_extents(plan), *((offset, nbytes, index, 0) for index, (offset, nbytes) in payloads)])
    num_payloads, num_chunks = len(plan.payload_offsets), max(1, -(-plan.file_bytes // chunk_bytes))
    small, between = SmallPieces(), SmallPieces()
    large: list[list[LargePiece]] = [[] for _ in range(num_chunks)]
    for offset, nbytes, source, source_start in extents:
        done = 0
        while done < nbytes:
            k, chunk_offset = divmod(offset + done, chunk_bytes)
            size = min(nbytes - done, chunk_bytes - chunk_offset)
            piece = LargePiece(source, source_start + done, chunk_offset, size)
            small.end(k)
            between.end(k)
            if source == num_payloads + 1:
                between.add(piece)
            elif source >= num_payloads or size >= LONG_BYTES or source in plan.strided:
                large[k].append(piece)
            else:
                small.add(piece)
            done += size
    small.end(num_chunks)
    between.end(num_chunks)
    offsets = [k * chunk_bytes for k in range(num_chunks)]
    return ChunkMap(
        file_bytes=plan.file_bytes,
        offsets=offsets,
        nbytes=[min(chunk_bytes, plan.file_bytes - offset) for offset in offsets],
        num_payloads=num_payloads,
        small=small,
        large=large,
        between=between,
        middle=b"".join(data for _, data in plan.literals[1:-1] if len(data) < LONG_BYTES),
        key=object(),
        probes=ProbeMap(plan, chunk_bytes, num_chunks),
        pick_small=picker(small.sources),
        long_literals=_long_literals(plan),
    )


def _literal_extents(plan: FilePlan) -> list[tuple[int, int, int, int]]:
    """(file offset, bytes, source, offset in the source) of each literal."""
    first, middle, last = range(len(plan.payload_offsets), len(plan.payload_offsets) + 3)
    between = [literal for literal in plan.literals[1:-1] if len(literal[1]) < LONG_BYTES]
    starts = list(accumulate([len(data) for _, data in between], initial=0))
    extents = [(offset, len(data), middle, start) for (offset, data), start in zip(between, starts, strict=False)]
    ends = [(plan.literals[0], first), (plan.literals[-1], last)][: len(plan.literals)]
    ends += zip(map(plan.literals.__getitem__, _long_literals(plan)), count(last + 1))
    return [*extents, *((offset, len(data), source, 0) for (offset, data), source in ends)]


def _long_literals(plan: FilePlan) -> list[int]:
    return [k for k, (_, data) in enumerate(plan.literals[1:-1], 1) if len(data) >= LONG_BYTES]
