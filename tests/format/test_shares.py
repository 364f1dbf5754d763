"""A file that is cut into shares: sealed each by itself and joined, it is the file that one sealer makes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from async_ckpt import RankFailedError
from async_ckpt.format.checksum import crc32
from async_ckpt.format.sealer import Sealer
from async_ckpt.format.shares import ShareSealer, Told, amended, check_agreement, cut, head_blocks
from async_ckpt.format.zip import Container, lay_out

CHUNK_BYTES = 256
_LIKE_A_DESCRIPTOR = b"PK\x07\x08"


def container_of(seed: int) -> tuple[Container, bytearray]:
    """A file laid out, and its bytes before any sealing."""
    numbers = random.Random(seed)
    sizes = [numbers.choice((0, 1, 7, 8, 60, 255, 256, 257, 1000, 5000)) for _ in range(numbers.randrange(1, 14))]
    pickled = numbers.randbytes(numbers.choice((20, 300, 900)))
    alignment = numbers.choice((1, 4, 7, 64, 100))
    container = lay_out(pickled, sizes, name_hash=b"1" * 20, alignment=alignment)
    image = bytearray(container.file_bytes)
    for offset, data in container.literals:
        image[offset : offset + len(data)] = data
    for offset, nbytes in zip(container.payload_offsets, container.payload_nbytes, strict=True):
        payload = numbers.randbytes(nbytes)
        if numbers.random() < 0.4:
            payload = (_LIKE_A_DESCRIPTOR + payload)[:nbytes]
        image[offset : offset + nbytes] = payload
    return container, image


def sealed(sealer: Any, image: bytearray, start: int, end: int) -> list[int]:
    view = memoryview(image)
    return [sealer(k, view[k : min(k + CHUNK_BYTES, end)]) for k in range(start, end, CHUNK_BYTES)]


def tell(container: Container, image: bytearray, rank: int, num_writers: int) -> tuple[Told, bytearray]:
    """What a rank tells, and what it has written."""
    share = cut(container.file_bytes, CHUNK_BYTES, container.payload_offsets, rank, num_writers)
    sealer, copy = ShareSealer(container, share), bytearray(image)
    crcs = sealed(sealer, copy, share.start, share.copied_end)
    extents = crcs[: -(-(share.end - share.start) // CHUNK_BYTES)]
    told = Told(
        cut=str(num_writers),
        plan="same",
        blocks="",
        start=share.start,
        end=share.end,
        extents=extents,
        parts=sealer.mine.parts or (),
        first=sealer.first,
        compared=sealer.compared,
        slips=sealer.mine.sealed.slips,
    )
    return Told.decode(told.encode()), copy[share.start : share.end]


def agreed(container: Container, told: dict[int, Told]) -> list[Told]:
    head = b"".join(data for offset, data in container.literals if offset < container.payload_offsets[0])
    return check_agreement("m.pt", told, head, container, CHUNK_BYTES)


@pytest.mark.parametrize("num_writers", [1, 2, 3, 5, 8, 40])
def test_shares_joined_are_the_file_that_one_sealer_makes(num_writers: int) -> None:
    for seed in range(60):
        container, image = container_of(seed)
        if not container.payload_offsets:
            continue
        whole = bytearray(image)
        crcs = sealed(Sealer(container), whole, 0, container.file_bytes)
        made = {rank: tell(container, image, rank, num_writers) for rank in range(num_writers)}
        shares = agreed(container, {rank: told for rank, (told, _) in made.items()})
        assert [share.start for share in shares[1:]] == [share.end for share in shares[:-1]]
        assert (shares[0].start, shares[-1].end) == (0, container.file_bytes)
        by_start = {told.start: data for told, data in made.values() if told.end > told.start}
        file = bytearray(b"".join(by_start[share.start] for share in shares))
        joined = Sealer(container).joined([(s.start, s.end, s.parts, s.slips) for s in shares])
        before = []
        for at, data in joined:
            before.append(bytes(file[at : at + len(data)]))
            file[at : at + len(data)] = data
        assert file == whole, seed
        extents = [crc for share in shares for crc in share.extents]
        assert amended(extents, CHUNK_BYTES, container.file_bytes, joined, before) == tuple(crcs), seed
        assert crcs == [crc32(whole[k : k + CHUNK_BYTES]) for k in range(0, len(whole), CHUNK_BYTES)]


def test_shares_are_even_and_the_head_is_the_first_ones() -> None:
    shares = [cut(10_000, 100, [250], rank, 4) for rank in range(6)]
    assert [(share.start, share.end) for share in shares] == [
        (0, 2500),
        (2500, 5000),
        (5000, 7500),
        (7500, 10_000),
        (0, 0),
        (0, 0),
    ]
    assert [share.copied_end for share in shares] == [2600, 5100, 7600, 10_000, 100, 100]
    late = [cut(10_000, 100, [6010], rank, 4) for rank in range(4)]
    assert [(share.start, share.end) for share in late] == [(0, 6100), (6100, 6100), (6100, 7500), (7500, 10_000)]


def test_no_border_cuts_the_first_bytes_of_a_payload() -> None:
    assert [cut(1000, 100, [10, 497], rank, 2).start for rank in range(2)] == [0, 600]
    assert [cut(1000, 100, [10, 492], rank, 2).start for rank in range(2)] == [0, 500]


def test_more_ranks_than_chunks_compare_the_first_chunk() -> None:
    assert [(s.start, s.end, s.copied_end) for s in (cut(90, 100, [10], rank, 3) for rank in range(3))] == [
        (0, 90, 90),
        (0, 0, 90),
        (0, 0, 90),
    ]


@pytest.mark.parametrize("what", ["plan", "cut"])
def test_what_differs_is_told_with_its_rank(what: str) -> None:
    container, image = container_of(3)
    told = {rank: tell(container, image, rank, 3)[0] for rank in range(3)}
    told[1] = Told(**{**vars(told[1]), what: "another"})
    with pytest.raises(RankFailedError, match="rank 1 holds another one") as caught:
        agreed(container, told)
    assert caught.value.rank == 1


def test_a_byte_of_the_compared_chunk_that_differs_is_told_with_both_ranks() -> None:
    container, image = container_of(3)
    told = {rank: tell(container, image, rank, 3)[0] for rank in range(3)}
    at = max(told[1].end, container.payload_offsets[0])
    other = bytearray(image)
    payload = next(k for k, offset in enumerate(container.payload_offsets) if offset + container.payload_nbytes[k] > at)
    other[max(at, container.payload_offsets[payload])] ^= 1
    told[2] = tell(container, other, 2, 3)[0]
    with pytest.raises(RankFailedError, match="ranks 1 and 2 hold different values"):
        agreed(container, told)


def test_blocks_tell_where_heads_differ() -> None:
    head = bytes(range(200))
    other = head[:70] + b"x" + head[71:]
    pairs = zip(bytes.fromhex(head_blocks(head)), bytes.fromhex(head_blocks(other)), strict=True)
    assert [k for k, (one, two) in enumerate(pairs) if one != two] == [70 // 4]
