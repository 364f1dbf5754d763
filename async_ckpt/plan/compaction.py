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
        self.views: dict[int, tuple[int, int, int]] = {}
        """By storage, from where to where views cover bytes of it, and how many views these are."""
        self.shortened: dict[int, torch.UntypedStorage] = {}
        self.parts: dict[int, Part] = {}

    def learn(self, tensor: torch.Tensor) -> Any:
        reduced = _reduced(tensor)
        if reduced is not NotImplemented:
            held, offset, size, stride = reduced[1][:4]
            key = _storage(held)._cdata
            low, high, num_views = self.views.get(key, (0, 0, 0))
            start, stop = (edge * tensor.dtype.itemsize for edge in view_span(size, stride, offset))
            if start < stop:
                low, high = (min(low, start), max(high, stop)) if low < high else (start, stop)
            self.views[key] = low, high, num_views + 1
        return reduced

    def settle(self, uses: Mapping[int, int]) -> None:
        """Forget storages that something else than a plain view refers to: those are written whole."""
        self.views = {key: found for key, found in self.views.items() if uses.get(key) == found[2]}

    def shorten(self, tensor: torch.Tensor) -> Any:
        reduced = _reduced(tensor)
        if reduced is NotImplemented or _storage(reduced[1][0])._cdata not in self.views:
            return reduced
        held, offset, size, stride, *rest = reduced[1]
        storage, item = _storage(held), tensor.dtype.itemsize
        low, high, num_views = self.views[storage._cdata]
        lazy_bits = type(rest[-1]) is dict
        if num_views == 1 and prod(size) * item < high - low and not lazy_bits:
            # As long as what is written, which is not what lies there.
            short = storage[low : low + prod(size) * item]
            self.parts[short._cdata] = storage, low, Strided(tensor.dtype, tuple(size), tuple(stride))
            offset, stride = 0, torch.empty(size, device="meta").stride()
        else:
            short = self.shortened.setdefault(storage._cdata, storage[low:high])
            self.parts[short._cdata] = storage, low, None
            offset = 0 if 0 in size else offset - low // item
        wrapped: Any = short
        if held is not storage:
            wrapped = torch.storage.TypedStorage(wrap_storage=short, dtype=held.dtype, _internal=True)
        return reduced[0], (wrapped, offset, size, stride, *rest)


def _reduced(tensor: torch.Tensor) -> Any:
    """torch's reduce value if it is (rebuild, (storage, offset, size, stride, ...)) of a plain strided view, else
    NotImplemented.
    """
    reduced: Any = tensor.__reduce_ex__(2) if type(tensor) is torch.Tensor else None
    is_view = reduced is not None and reduced[0].__name__ in ("_rebuild_tensor_v2", "_rebuild_tensor_v3")
    return reduced if is_view else NotImplemented


def _storage(held: Any) -> torch.UntypedStorage:
    found: torch.UntypedStorage = held if isinstance(held, torch.UntypedStorage) else held._untyped_storage
    return found
