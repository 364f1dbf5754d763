"""A committed file as the seekable file object that `torch.load` reads.

Guarantees:
- Every byte it hands out was verified (where the file is opened with `check`).
- Large reads go to the disk in parallel, straight through to the caller's memory; a few extents are held for small
  ones.
"""

from __future__ import annotations

import io
import os
from typing import Any

from ..host.memory import address_of, move
from .verified_file import VerifiedFile

_HELD_EXTENTS = 4


class TorchFile(io.RawIOBase):
    """See `io.RawIOBase`; reads a `VerifiedFile`, which stays the caller's to close. One thread at a time."""

    def __init__(self, file: VerifiedFile) -> None:
        super().__init__()
        self._verified = file
        self._position = 0
        self.failure: BaseException | None = None
        """The first error of a read: torch's reader swallows it and complains about a missing attribute instead."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._verified.size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        try:
            return self._readinto(buffer)
        except BaseException as error:
            if self.failure is None:
                self.failure = error
            raise

    def _readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        first = self._position
        end = min(first + len(target), self._verified.size_bytes)
        if end <= first:
            return 0
        whole = [
            extent for extent in self._verified.extents_of(first, end - first) if self._is_large(extent, first, end)
        ]
        if whole:
            self._stream_into(target, first, whole)
        for extent in self._verified.extents_of(first, end - first):
            if extent not in whole:
                low, high = self._verified.extent_range(extent)
                low, high = max(low, first), min(high, end)
                target[low - first : high - first] = self._verified.view(low, high - low)
                self._drop_oldest()
        self._position = end
        return end - first

    def _is_large(self, extent: int, first: int, end: int) -> bool:
        low, high = self._verified.extent_range(extent)
        return first <= low and high <= end and not self._verified.is_kept(extent)

    def _stream_into(self, target: memoryview, first: int, extents: list[int]) -> None:
        address = address_of(target)

        def consume(offset: int, view: memoryview) -> None:
            move(address + offset - first, address_of(view), len(view))

        self._verified.stream(consume, extents)

    def _drop_oldest(self) -> None:
        kept = self._verified.kept()
        self._verified.drop(kept[: max(0, len(kept) - _HELD_EXTENTS)])
