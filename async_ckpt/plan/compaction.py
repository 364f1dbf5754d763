"""How much of each storage is written: all of it, as torch does, or (compact) only the bytes that views cover."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch

from .strided import Strided, view_span
from .torch_layout import Part, Recorded


def record_compact(obj: Any) -> Recorded:
    """`Recorded` with `compact_views`: torch pickles shortened storages in place of those of which only views are met.

    Two runs: the first learns every view, the second writes. Raises RecordingError like `Recorded`.
    """
    compactor = _Compactor()
    compactor.settle(Recorded(obj, compactor.learn).uses)
    recorded = Recorded(obj, compactor.shorten)
    recorded.parts = compactor.parts
    return recorded


class _Compactor:
    def __init__(self) -> None:
        self.low: dict[int, int] = {}
        self.high: dict[int, int] = {}
        self.views: dict[int, int] = {}
        self.shortened: dict[int, torch.UntypedStorage] = {}
        self.parts: dict[int, Part] = {}

    @staticmethod
    def _reduced(tensor: torch.Tensor) -> Any:
        """torch's reduce value if it is (rebuild, (storage, offset, size, stride, ...)) of a plain strided view, else
        None.
        """
        if type(tensor) is not torch.Tensor:
            return None
        reduced = tensor.__reduce_ex__(2)
        return reduced if reduced[0].__name__ in ("_rebuild_tensor_v2", "_rebuild_tensor_v3") else None

    @staticmethod
    def _storage(reduced: Any) -> torch.UntypedStorage:
        held: Any = reduced[1][0]
        storage: torch.UntypedStorage = held if isinstance(held, torch.UntypedStorage) else held._untyped_storage
        return storage

    def learn(self, tensor: torch.Tensor) -> Any:
        reduced = self._reduced(tensor)
        if reduced is None:
            return NotImplemented
        key, item = self._storage(reduced)._cdata, tensor.dtype.itemsize
        _, offset, size, stride = reduced[1][:4]
        start, stop = (edge * item for edge in view_span(size, stride, offset))
        self.views[key] = self.views.get(key, 0) + 1
        if start < stop:
            self.low[key] = min(self.low.get(key, start), start)
            self.high[key] = max(self.high.get(key, stop), stop)
        return reduced

    def settle(self, uses: Mapping[int, int]) -> None:
        """Forget storages that something else than a plain view refers to: those are written whole."""
        self.views = {key: count for key, count in self.views.items() if uses.get(key) == count}

    def shorten(self, tensor: torch.Tensor) -> Any:
        reduced = self._reduced(tensor)
        if reduced is None:
            return NotImplemented
        storage, item = self._storage(reduced), tensor.dtype.itemsize
        key = storage._cdata
        if key not in self.views:
            return reduced
        held, offset, size, stride, *rest = reduced[1]
        low, high = self.low.get(key, 0), self.high.get(key, 0)
        lazy_bits = type(rest[-1]) is dict
        if self.views[key] == 1 and prod(size) * item < high - low and not lazy_bits:
            # As long as what is written, which is not what lies there.
            short = storage[low : low + prod(size) * item]
            self.parts[short._cdata] = storage, low, Strided(tensor.dtype, tuple(size), tuple(stride))
            offset, stride = 0, torch.empty(size, device="meta").stride()
        else:
            short = self.shortened.setdefault(key, storage[low:high])
            self.parts[short._cdata] = storage, low, None
            offset = 0 if 0 in size else offset - low // item
        wrapped: Any = short
        if not isinstance(held, torch.UntypedStorage):
            wrapped = torch.storage.TypedStorage(wrap_storage=short, dtype=held.dtype, _internal=True)
        return reduced[0], (wrapped, offset, size, stride, *rest)
