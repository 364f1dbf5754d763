"""One file that several ranks write together: which chunks each of them writes, and what each tells the others. No I/O.

Each rank also copies the first chunk of the next one's share, which is compared and not written; one that writes
nothing copies the file's first chunk.
"""

from __future__ import annotations

import contextlib
import json
import struct
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import RankFailedError, some_of
from .checksum import crc32, crc32_combine
from .inert import MalformedPickleError
from .named import placed
from .sealer import Sealer, payload_at
from .zip import Container

_BLOCK_BYTES = 4
_MAX_BLOCKS = 1 << 14


@dataclass(frozen=True, slots=True)
class Share:
    """The bytes of a file that one rank writes, `[start, end)`, and those that it copies: from `start` too."""

    start: int
    end: int
    copied_end: int


def cut(file_bytes: int, chunk_bytes: int, payload_offsets: Sequence[int], rank: int, num_writers: int) -> Share:
    """The share of `rank`; ranks from `num_writers` on write nothing. All of the file before its first payload is rank
    0's, and no border lies within the first eight bytes of a payload.
    """
    num_chunks = -(-file_bytes // chunk_bytes)
    num_writers = min(num_writers, num_chunks)
    head_bytes = payload_offsets[0] if payload_offsets else file_bytes

    def border(writer: int) -> int:
        k = max(-(-head_bytes // chunk_bytes), writer * num_chunks // num_writers) if writer else 0
        while k < num_chunks and _cuts_head(payload_offsets, k * chunk_bytes):
            k += 1
        return min(k * chunk_bytes, file_bytes)

    start, end = (border(rank), border(rank + 1)) if rank < num_writers else (0, 0)
    start, end = (start, end) if start < file_bytes else (0, 0)
    return Share(start, end, min(end + chunk_bytes, file_bytes))


def _cuts_head(payload_offsets: Sequence[int], border: int) -> bool:
    index = bisect_left(payload_offsets, border) - 1
    return index >= 0 and payload_offsets[index] + 8 > border


class ShareSealer:
    """Seals the chunks that one rank copies, as `Sealer` does, and notes what of them is compared."""

    def __init__(self, container: Container, share: Share) -> None:
        self._share = share
        self.mine, self._next = Sealer(container, share.start), Sealer(container, share.end)
        self.extents: list[int] = []
        """The CRCs of the share's chunks."""
        self.first: list[int] = []
        """`Sealer.parts` of the share's first chunk, or else its CRC."""
        self.compared: list[int] = []
        """The same of the chunk behind the share."""

    def __call__(self, offset: int, view: memoryview) -> int:
        if offset >= self._share.end:
            crc = self._next(offset, view)
            self.compared = _noted(self._next.parts, crc)
        else:
            crc = self.mine(offset, view)
            self.extents.append(crc)
            if offset == self._share.start:
                self.first = _noted(self.mine.parts, crc)
        return crc


def _noted(parts: list[int] | None, crc: int) -> list[int]:
    return [crc] if parts is None else parts


_NUMBERS = ("extents", "parts", "first", "compared")


@dataclass(frozen=True)
class Told:
    """What one rank tells of a file that all hold."""

    cut: str
    """How it cuts the file."""
    plan: str
    """A digest of all that is no payload."""
    blocks: str
    """A byte in hex for each piece of the file's head, so that the first one that differs can be found."""
    start: int
    end: int
    extents: Sequence[int]
    """The CRCs of its chunks."""
    parts: Sequence[int]
    """`Sealer.parts` of its share."""
    first: Sequence[int]
    compared: Sequence[int]
    """As `ShareSealer` notes them."""
    slips: Mapping[int, int]

    def encode(self) -> dict[str, Any]:
        """What JSON holds of it."""
        numbers = {name: struct.pack(f">{len(vars(self)[name])}I", *vars(self)[name]).hex() for name in _NUMBERS}
        return {**vars(self), **numbers, "slips": {str(payload): slip for payload, slip in self.slips.items()}}

    @classmethod
    def decode(cls, raw: Mapping[str, Any]) -> Told:
        """The one of which `encode` has made `raw`."""
        numbers = {name: struct.unpack(f">{len(raw[name]) // 8}I", bytes.fromhex(raw[name])) for name in _NUMBERS}
        return cls(**{**raw, **numbers, "slips": {int(payload): slip for payload, slip in raw["slips"].items()}})


def head_blocks(head: bytes) -> str:
    """`Told.blocks` of a file's bytes before its first payload."""
    size = _block_bytes(head)
    return bytes(crc32(head[k : k + size]) & 0xFF for k in range(0, len(head), size)).hex()


def _block_bytes(head: bytes) -> int:
    # In powers of two: heads of nearly the same length are cut alike.
    return _BLOCK_BYTES << max(0, (len(head) // (_BLOCK_BYTES * _MAX_BLOCKS)).bit_length())


def check_agreement(
    path: str, told: Mapping[int, Told], head: bytes, container: Container, chunk_bytes: int
) -> list[Told]:
    """Compare what all ranks tell of the file `path`; returns what its writers tell, in file order.

    Args:
        told: by rank, the first of which gives all that follows.

    Raises:
        RankFailedError: they disagree; names ranks and key paths.
    """
    ours = next(iter(told.values()))
    usual = Counter((tells.cut, tells.plan) for tells in told.values()).most_common(1)[0][0]
    others = [rank for rank, tells in told.items() if (tells.cut, tells.plan) != usual]
    if others:
        theirs = next(tells for tells in told.values() if (tells.cut, tells.plan) != (ours.cut, ours.plan))
        where = f"is cut otherwise ({ours.cut}; {theirs.cut}): give all ranks one root and one chunk_bytes"
        if ours.cut == theirs.cut:
            where = f"differs at {_first_difference(head, ours, theirs)}"
        _refuse(
            path, others[0], f"rank {some_of(list(map(str, others)))} holds another one than the rest, which {where}"
        )
    writers = {tells.start: rank for rank, tells in told.items() if tells.end > tells.start}
    for rank, tells in told.items():
        first = told[writers[tells.end]].first if tells.compared else ()
        if tells.compared != first:
            index = payload_at(container, tells.end)
            found = list(range(index, bisect_left(container.payload_offsets, tells.end + chunk_bytes)))
            if _is_torch(head):
                found = [index + k for k, crc in enumerate(first) if crc != tells.compared[k]]
            names = _payload_names(head)
            where = some_of([names[k] for k in found if k < len(names)]) or "some tensor"
            pair = " and ".join(map(str, sorted((rank, writers[tells.end]))))
            _refuse(path, rank, f"ranks {pair} hold different values of {where}")
    return [told[writers[start]] for start in sorted(writers)]


def _refuse(path: str, rank: int, why: str) -> NoReturn:
    raise RankFailedError(f"{path!r} was saved with replicated=True, but {why}", rank=rank)


def _is_torch(head: bytes) -> bool:
    return head.startswith(b"PK")


def _first_difference(head: bytes, ours: Told, theirs: Told) -> str:
    """The key path of the first scalar, name or tensor that is not the same in both."""
    pairs = zip(bytes.fromhex(ours.blocks), bytes.fromhex(theirs.blocks), strict=False)
    block = next((k for k, (one, other) in enumerate(pairs) if one != other), None)
    if block is None or not _is_torch(head):
        return "their keys, shapes or types"
    try:
        scalars, payloads = placed(head)
    except MalformedPickleError:
        return "an object"
    low, high = block * _block_bytes(head), (block + 1) * _block_bytes(head)
    found = [place for start, end, place in scalars if start < high and end > low]
    # What one of them lacks is missing behind this.
    before = max(((end, place) for _, end, place in scalars if end <= low), default=(0, ""))
    # What makes up a tensor is told by the tensor's path.
    near = [place for place in (before[1], *found) if place] or [""]
    short = [next((path for path in payloads if place.startswith(f"{path}[")), place) for place in near]
    return " or ".join(dict.fromkeys(f"state{place.removesuffix(' (the key)')}" for place in short))


def _payload_names(head: bytes) -> list[str]:
    if _is_torch(head):
        with contextlib.suppress(MalformedPickleError):
            return [f"state{place}" for place in placed(head)[1]]
        return []
    header = json.loads(head[8:])
    header.pop("__metadata__", None)
    spans = sorted((*tensor["data_offsets"], name) for name, tensor in header.items())
    return [repr(name) for start, end, name in spans if end > start]


def amended(
    crcs: Sequence[int],
    chunk_bytes: int,
    file_bytes: int,
    changes: Sequence[tuple[int, bytes]],
    before: Sequence[bytes],
) -> tuple[int, ...]:
    """The CRCs of a file's chunks once the bytes `before` have become `changes`, one after the other."""
    now = list(crcs)
    for (at, after), old in zip(changes, before, strict=True):
        for k in range(at // chunk_bytes, -(-(at + len(after)) // chunk_bytes)):
            start, end = k * chunk_bytes, min((k + 1) * chunk_bytes, file_bytes)
            part = slice(max(start - at, 0), end - at)
            # CRCs are linear: of all that goes before and after, only the length counts.
            num_bytes_after = max(0, end - at - len(after))
            now[k] ^= crc32_combine(crc32(old[part]) ^ crc32(after[part]), 0, num_bytes_after)
    return tuple(now)
