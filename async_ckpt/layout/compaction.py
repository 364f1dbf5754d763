"""How much of each storage is written: all of it, as torch does, or (compact) only the bytes that views cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .tensorfacts import LiveTensors, StoragePattern


@dataclass(frozen=True, slots=True)
class Extents:
    """Per distinct storage the bytes to write, per tensor its place in them."""

    starts: Sequence[int]
    nbytes: Sequence[int]
    offsets: Sequence[int]
    """In elements, from the start of what is written."""
    strides: Sequence[tuple[int, ...]]
    copied: Mapping[int, int]
    """Storage -> index of its only tensor, where the elements are written row major from a copy instead of a span with gaps."""


def view_span(sizes: Sequence[int], strides: Sequence[int], offset: int) -> tuple[int, int]:
    """Half-open range of elements that a view touches; empty for a view without elements."""
    if 0 in sizes:
        return 0, 0
    return offset, offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def dense_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Strides of a row-major tensor, as torch gives them (a size of 0 counts as 1)."""
    strides: list[int] = []
    step = 1
    for size in reversed(sizes):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def num_elements(sizes: Sequence[int]) -> int:
    count = 1
    for size in sizes:
        count *= size
    return count


def plan_extents(live: LiveTensors, pattern: StoragePattern, *, compact_views: bool) -> Extents:
    """Whole storages, or with `compact_views` the union span of each storage's views."""
    if not compact_views:
        return Extents([0] * len(pattern.nbytes), pattern.nbytes, live.offsets, live.strides, {})
    low, high, views = [0] * len(pattern.nbytes), [0] * len(pattern.nbytes), [0] * len(pattern.nbytes)
    for index, storage in enumerate(pattern.storage_of):
        views[storage] += 1
        start, stop = view_span(live.sizes[index], live.strides[index], live.offsets[index])
        if start == stop:
            continue
        item = live.dtypes[index].itemsize
        start, stop = start * item, stop * item
        if low[storage] == high[storage]:
            low[storage], high[storage] = start, stop
        else:
            low[storage], high[storage] = min(low[storage], start), max(high[storage], stop)
    nbytes = [stop - start for start, stop in zip(low, high, strict=True)]
    offsets, strides, copied = list(live.offsets), list(live.strides), {}
    for index, storage in enumerate(pattern.storage_of):
        item, sizes = live.dtypes[index].itemsize, live.sizes[index]
        if views[storage] == 1 and num_elements(sizes) * item < nbytes[storage]:
            copied[storage] = index
            low[storage], nbytes[storage] = 0, num_elements(sizes) * item
            offsets[index], strides[index] = 0, dense_strides(sizes)
        else:
            offsets[index] = 0 if 0 in sizes else offsets[index] - low[storage] // item
    return Extents(low, nbytes, offsets, strides, copied)
