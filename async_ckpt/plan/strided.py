"""Payloads that are written row by row from memory that holds their elements in another order, or with gaps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..host.device import plain_torch

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}
"""What elements are moved as: not every dtype can be copied."""


def view_span(sizes: Sequence[int], strides: Sequence[int], offset: int) -> tuple[int, int]:
    """Half-open range of elements that a view touches; empty for a view without elements."""
    if 0 in sizes:
        return 0, 0
    return offset, offset + 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


@dataclass(frozen=True, slots=True)
class Strided:
    """How the elements of one payload lie in its storage. Data only."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    is_conj: bool = False
    is_neg: bool = False
    """Whether what is written is the conjugate, or the negative, of what lies there."""

    @property
    def span_bytes(self) -> int:
        """From the first byte to behind the last one in the storage."""
        return view_span(self.sizes, self.strides, 0)[1] * self.dtype.itemsize

    def displacement(self, element: int) -> int:
        """The bytes in the storage from the first element to the row-major `element`-th one."""
        steps = 0
        for size, stride in zip(reversed(self.sizes), reversed(self.strides), strict=True):
            element, index = divmod(element, size)
            steps += index * stride
        return steps * self.dtype.itemsize

    def memory(self, storage: torch.UntypedStorage, offset_bytes: int) -> torch.Tensor:
        """The elements where they lie, the first one `offset_bytes` into `storage`."""
        bare = not (self.is_conj or self.is_neg)
        dtype = _SAME_SIZE[self.dtype.itemsize] if bare else self.dtype
        with plain_torch():
            made = torch.empty(0, dtype=dtype, device=storage.device)
            made = made.set_(storage, offset_bytes // dtype.itemsize, self.sizes, self.strides)
            made = made.conj() if self.is_conj else made
            return torch._neg_view(made) if self.is_neg else made


def row_major_bytes(memory: torch.Tensor, start: int, nbytes: int) -> torch.Tensor:
    """A copy of the bytes [start, start + nbytes) that a contiguous copy of `memory` would have, on its device."""
    item = memory.element_size()
    first, end = start // item, -(-(start + nbytes) // item)
    with plain_torch():
        copy = torch.empty(end - first, dtype=memory.dtype, device=memory.device)
        done = 0
        for box in _boxes(memory, first, end):
            copy[done : done + box.numel()].view(box.shape).copy_(box)
            done += box.numel()
        return copy.view(torch.uint8)[start - first * item :][:nbytes]


def _boxes(memory: torch.Tensor, first: int, end: int) -> Iterator[torch.Tensor]:
    """The parts of `memory` that make up its row-major elements [first, end), in order."""
    if first >= end:
        return
    if end - first == memory.numel():
        yield memory
        return
    row = memory.numel() // memory.size(0)
    (top, skipped), (bottom, rest) = divmod(first, row), divmod(end, row)
    if top == bottom:
        yield from _boxes(memory[top], skipped, rest)
        return
    if skipped:
        yield from _boxes(memory[top], skipped, row)
        top += 1
    if top < bottom:
        yield memory[top:bottom]
    if rest:
        yield from _boxes(memory[bottom], 0, rest)
