"""What pickling needs to know about plain tensors, in columns: one C-speed pass over all tensors per fact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import attrgetter, eq
from typing import Any, NamedTuple

import torch

from ..host.device import is_copyable
from .structure import NotPlainError, SharingPattern, picker

_dtype_of = attrgetter("dtype")
_device_of = attrgetter("device")
_is_cpu = attrgetter("is_cpu")
_requires_grad_of = attrgetter("requires_grad")
_attributes_of = attrgetter("__dict__")
_identity_of = attrgetter("_cdata")

_QUANTIZED = frozenset((torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4))


class Columns(NamedTuple):
    """Facts that must be equal for a plan to be reused."""

    sizes: list[tuple[int, ...]]
    strides: list[tuple[int, ...]]
    offsets: list[Any]
    dtypes: list[torch.dtype]
    devices: list[torch.device]
    requires_grad: list[bool]


@dataclass(slots=True)
class Live:
    """The tensors of one state and the storage of each. Short-lived: it keeps them alive."""

    tensors: Sequence[torch.Tensor]
    storages: list[torch.UntypedStorage]
    """The same storage may come as several Python objects."""
    storage_ids: list[int]
    """What tells them apart (`_cdata`)."""
    addresses: list[int] = field(default_factory=list, init=False)
    """The address of each distinct storage, once it was found readable."""


def look_at(tensors: Sequence[torch.Tensor]) -> tuple[Live, Columns]:
    """Read the facts of `tensors`, which are torch.Tensor or Parameter exactly. Raises NotPlainError for what is not
    plain and dense.
    """
    tensor = torch.Tensor
    try:
        # A default device installs a function mode, which would turn each of these calls into Python.
        with torch._C.DisableTorchFunction():
            columns = Columns(
                list(map(tensor.size, tensors)),
                list(map(tensor.stride, tensors)),
                list(map(tensor.storage_offset, tensors)),
                list(map(_dtype_of, tensors)),
                list(map(_device_of, tensors)),
                list(map(_requires_grad_of, tensors)),
            )
            if _has_more(tensors, columns.dtypes):
                raise NotPlainError("a tensor has the negative or conjugate bit, or Python attributes")
            if not _QUANTIZED.isdisjoint(columns.dtypes):
                raise NotPlainError("a quantised tensor, whose scale is none of the facts here")
            storages = list(map(tensor.untyped_storage, tensors))
    except (RuntimeError, NotImplementedError) as error:
        raise NotPlainError(f"a tensor without a plain storage: {error}") from error
    for device in set(columns.devices):
        if not is_copyable(device):
            raise NotPlainError(f"a tensor on device '{device}', whose bytes cannot be copied")
    return Live(tensors, storages, list(map(_identity_of, storages))), columns


def _has_more(tensors: Sequence[torch.Tensor], dtypes: Sequence[torch.dtype]) -> bool:
    """Whether some tensor has lazy bits or Python attributes, which pickle writes too."""
    has_complex = any(dtype.is_complex for dtype in set(dtypes))
    return (
        any(map(torch.Tensor.is_neg, tensors))
        or any(map(_attributes_of, tensors))
        or (has_complex and any(map(torch.Tensor.is_conj, tensors)))
    )


class TensorFacts:
    """The facts of one state's tensors, which share a storage, and how long each storage is. Keeps no tensor alive."""

    def __init__(self, live: Live, columns: Columns) -> None:
        """Raises NotPlainError for storages without data, or two over the same memory."""
        self._sizes, strides, self._offsets, self._dtypes, self._devices, self._requires_grad = columns
        self._is_on_cpu = all(device.type == "cpu" for device in set(self._devices))
        # Where every size is above 1, a contiguous tensor has no other strides.
        is_dense = [
            tensor.is_contiguous() and all(extent > 1 for extent in size)
            for tensor, size in zip(live.tensors, self._sizes, strict=True)
        ]
        others = [index for index, dense in enumerate(is_dense) if not dense]
        self._pick_dense = picker([index for index, dense in enumerate(is_dense) if dense])
        self._pick_others = picker(others)
        self._other_strides = [strides[index] for index in others]
        self._sharing = SharingPattern(live.storage_ids)
        self.distinct = self._sharing.firsts
        """One tensor index per distinct storage, in order of first appearance."""
        self._pick_distinct = picker(self.distinct)
        self.nbytes = list(map(torch.UntypedStorage.nbytes, self._pick_distinct(live.storages)))
        """The size of each distinct storage."""
        self._addresses: list[int] = []
        """The addresses of the last state that was readable."""
        if not self._is_readable(live):
            raise NotPlainError("storages without data, or two storages over the same memory")

    def match(self, tensors: Sequence[torch.Tensor]) -> Live | None:
        """The storages of `tensors` if they have these facts, else None. About 0.5 us per tensor.

        torch's own guards (`TensorGuards`) compare in 0.1 us, but end the process where a tensor of some layouts takes
        a dense one's place.
        """
        tensor = torch.Tensor
        try:
            with torch._C.DisableTorchFunction():
                # The cheapest method that tells it, and objects made for it one by one: thousands of new ones at once
                # would wake the garbage collector.
                same = (
                    all(map(eq, map(tensor.size, tensors), self._sizes))
                    and all(map(tensor.is_contiguous, self._pick_dense(tensors)))
                    and all(map(eq, map(tensor.stride, self._pick_others(tensors)), self._other_strides))
                    and list(map(tensor.storage_offset, tensors)) == self._offsets
                    and list(map(_dtype_of, tensors)) == self._dtypes
                    and (
                        all(map(_is_cpu, tensors))
                        if self._is_on_cpu
                        else list(map(_device_of, tensors)) == self._devices
                    )
                    and list(map(_requires_grad_of, tensors)) == self._requires_grad
                    and not _has_more(tensors, self._dtypes)
                )
                storages = list(map(tensor.untyped_storage, tensors)) if same else []
        except (RuntimeError, NotImplementedError):
            return None
        live = Live(tensors, storages, list(map(_identity_of, storages)))
        return live if same and self._sharing.matches(live.storage_ids) and self._is_readable(live) else None

    def _is_readable(self, live: Live) -> bool:
        """False where a storage has another size, a non-empty one has no address, or two have the same one (torch then
        compares dtypes across them).
        """
        storages = self._pick_distinct(live.storages)
        if list(map(torch.UntypedStorage.nbytes, storages)) != self.nbytes:
            return False
        try:
            live.addresses = list(map(torch.UntypedStorage.data_ptr, storages))
        except RuntimeError:
            # A tensor that is known to be zero has a storage without an address.
            return False
        if live.addresses == self._addresses:
            return True
        filled = list(compress(live.addresses, self.nbytes))
        is_readable = all(filled) and len(set(filled)) == len(filled)
        self._addresses = live.addresses if is_readable else self._addresses
        return is_readable
