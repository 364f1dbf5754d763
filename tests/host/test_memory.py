"""Regions of memory: what the kernel says of them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from async_ckpt.host.memory import (
    HUGE_PAGE_BYTES,
    LONG_BYTES,
    PAGE_BYTES,
    address_of,
    move,
    populate,
    region,
    shared_region,
)


def mapping_of(address: int) -> list[str]:
    """Lines of /proc/self/smaps about the mapping that holds `address`."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [k for k, line in enumerate(lines) if "-" in line.split()[0] and not line.split()[0].endswith(":")]
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        low, high = (int(part, 16) for part in lines[start].split()[0].split("-"))
        if low <= address < high:
            return lines[start:stop]
    raise AssertionError("not mapped")


@pytest.mark.wide
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("num_bytes", [1, PAGE_BYTES, 100_000, 4 * HUGE_PAGE_BYTES])
def test_a_region_is_aligned_zeroed_and_private(num_bytes: int) -> None:
    memory = region(num_bytes)
    address = address_of(memory)
    assert len(memory) == num_bytes and address % PAGE_BYTES == 0 and not any(memory[:1000])
    memory[-1] = 7
    assert mapping_of(address)[0].split()[1] == "rw-p", "the kernel gives shared memory no huge pages"
    if num_bytes >= HUGE_PAGE_BYTES and Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        inside = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        flags = next(line for line in mapping_of(inside) if line.startswith("VmFlags:")).split()
        assert "hg" in flags


@pytest.mark.wide
@pytest.mark.skipif(sys.platform != "linux", reason="memfd_create is Linux")
def test_a_shared_region_begins_at_a_huge_page_and_is_seen_by_all() -> None:
    """Wherever the kernel maps what is next: some holes of odd sizes lie between what is mapped already."""
    num_bytes = 4 * HUGE_PAGE_BYTES
    others = [region(num_bytes + HUGE_PAGE_BYTES + 4096 * k) for k in range(9)]
    del others[1::2]
    for _ in range(5):
        fd = os.memfd_create("test")
        try:
            os.ftruncate(fd, num_bytes)
            memory = shared_region(fd, num_bytes)
            memory[-1] = 7
            seen = os.pread(fd, 2, num_bytes - 1)
        finally:
            os.close(fd)
        assert len(memory) == num_bytes and address_of(memory) % HUGE_PAGE_BYTES == 0 and not any(memory[:1000])
        assert seen == b"\x07" and mapping_of(address_of(memory))[0].split()[1] == "rw-s"
        others.append(memory)


@pytest.mark.parametrize("num_bytes", [0, 1, LONG_BYTES - 1, LONG_BYTES, 3 * LONG_BYTES])
def test_moves_overlap_as_in_c(num_bytes: int) -> None:
    memory = region(4 * LONG_BYTES)
    memory[:num_bytes] = bytes(k * 31 % 251 for k in range(num_bytes))
    before = bytes(memory[:num_bytes])
    move(address_of(memory) + 10, address_of(memory), num_bytes)
    assert memory[10 : 10 + num_bytes] == before


def test_populate_says_whether_the_pages_are_there() -> None:
    memory = region(8 * PAGE_BYTES)
    release = tuple(int(part) for part in os.uname().release.split(".")[:2])
    assert populate(address_of(memory), 8 * PAGE_BYTES) is (release >= (5, 14))
    assert not populate(PAGE_BYTES, PAGE_BYTES), "nothing is mapped there"
    assert not any(memory)
