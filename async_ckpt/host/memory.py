"""Bytes in memory by address: regions of it, and moving them. Any thread.

Guarantees:
- Regions are page-aligned, zeroed and private, and of huge pages where the kernel has them: it gives none to shared
  memory, and the first touch of each page is what fresh memory costs.
- Moves of `LONG_BYTES` or more run without the GIL; shorter ones keep it, because handing it back and forth between
  threads costs more than the copy.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
from collections.abc import Iterator

PAGE_BYTES = 4096
HUGE_PAGE_BYTES = 2 << 20
LONG_BYTES = 64 << 10
_MADV_HUGEPAGE = 14
_MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14
_MADV_COLLAPSE = 25  # since 6.1
_MAP_FIXED = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
move_releasing_gil = ctypes.CDLL(None).memmove
"""C's memmove(target, source, num_bytes) itself: for loops in C over columns of numbers."""
move_holding_gil = ctypes.PyDLL(None).memmove
for _function in (move_releasing_gil, move_holding_gil):
    _function.restype = None
    _function.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_size_t]


def move(target: int, source: int, num_bytes: int) -> None:
    """Copy between addresses; they may overlap."""
    (move_releasing_gil if num_bytes >= LONG_BYTES else move_holding_gil)(target, source, num_bytes)


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer: its first member is the address, the others are not looked at."""

    _fields_ = [("address", ctypes.c_void_p), ("others", ctypes.c_byte * 128)]


def address_of(buffer: memoryview) -> int:
    """The address of the first byte of a buffer; valid while the buffer is alive."""
    if not buffer.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    found = _PyBuffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(buffer), ctypes.byref(found), 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(found))
    return int(found.address or 0)


def region(num_bytes: int) -> memoryview:
    """Fresh memory. Its capacity is rounded up to whole pages, its length is not."""
    capacity = max(PAGE_BYTES, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES)
    memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    view = memoryview(memory)
    if num_bytes >= HUGE_PAGE_BYTES:
        advise_huge_pages(address_of(view), capacity)
    return view[:num_bytes]


def shared_region(fd: int, num_bytes: int) -> memoryview:
    """The first bytes of a new file in memory, for all who map it; they begin at a huge page here. In huge pages where
    the kernel gives them to those who ask late: a disk fills small ones at half the rate. Raises OSError."""
    memory = memoryview(mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES))
    start = -address_of(memory) % HUGE_PAGE_BYTES
    view = memory[start : start + num_bytes]
    # In place of a part of the memory that is there, and unmapped with it.
    how = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
    if _libc.mmap(address_of(view), num_bytes, *how, fd, 0) != address_of(view):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    for offset in range(0, num_bytes, HUGE_PAGE_BYTES):
        # Of a huge page that has no page yet none is made.
        view[offset] = 0
    _libc.madvise(address_of(view), num_bytes, _MADV_COLLAPSE)
    return view


def view_at(address: int, num_bytes: int, *, owner: object) -> memoryview:
    """The bytes at `address`, which `owner` keeps there; the view keeps `owner`."""
    array = (ctypes.c_char * num_bytes).from_address(address)
    array.owner = owner  # type: ignore[attr-defined]
    return memoryview(array).cast("B")


def advise_huge_pages(address: int, num_bytes: int) -> None:
    """Ask for huge pages for those that lie wholly in these bytes. Advice only: a kernel that refuses it is slower, not
    wrong."""
    first = -(-address // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    end = (address + num_bytes) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    if end > first:
        _libc.madvise(first, end - first, _MADV_HUGEPAGE)


def populate(address: int, num_bytes: int) -> bool:
    """Touch whole pages, without the GIL; False where the kernel cannot."""
    return bool(_libc.madvise(address, num_bytes, _MADV_POPULATE_WRITE) == 0)


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Around work that makes very many objects and no garbage: the collector would walk torch's whole heap again and
    again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
