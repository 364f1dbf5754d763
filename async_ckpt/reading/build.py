"""Makes storages and tensors out of a plain pickle, and says which file bytes fill them.

Guarantees:
- A storage is allocated only after its size was found equal to its record's; all together are smaller than the file.
- No tensor reaches outside its storage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..errors import CorruptCheckpointError
from ..format.plain import NotPlainError, StorageRef
from ..format.tensors import STORAGE_TYPES
from ..format.zip_directory import Record
from .scatter import Scatter, new_storage

_COUNTED: dict[str, torch.dtype] = {
    name: getattr(torch, dtype) for name, dtype in STORAGE_TYPES.items() if not name.startswith("Q")
}
"""What the elements of plain storages are counted in."""

Place = Callable[[str], torch.device]
"""Device for a location tag of the file; raises what `torch.load` would raise if there is no such device."""


def place_for(map_location: Any) -> Place | None:
    """How `torch.load` places storages under this `map_location`; None where only torch itself can tell."""
    if isinstance(map_location, (str, torch.device)):
        device = torch.device(map_location)
        return None if device.type == "meta" else (lambda tag: _resolve(str(device)))
    return _resolve if map_location is None else None


def _resolve(tag: str) -> torch.device:
    if tag == "cpu":
        return torch.device("cpu")
    # Only torch knows all tags; it validates the device and moves the (empty) storage there.
    moved = torch.serialization.default_restore_location(torch.UntypedStorage(0), tag)
    return torch.device(moved.device)


def storage_extent(ref: StorageRef, records: Mapping[str, Record], dtype: torch.dtype, name: str) -> Record:
    """The record of a storage, after its size was compared with what the pickle says."""
    record_name = f"data/{ref.key}"
    record = records.get(record_name)
    num_bytes = ref.num_elements * dtype.itemsize
    if record is None or num_bytes > record.num_bytes:
        held = "is missing" if record is None else f"holds {record.num_bytes} bytes"
        message = f"{name}: the pickle needs {num_bytes} bytes of record {record_name!r}, which {held}"
        raise CorruptCheckpointError(message, path=name, record=record_name)
    if num_bytes < record.num_bytes:
        raise NotPlainError(f"{record_name} is longer than its storage")
    return record


def check_inside(
    ref: StorageRef, offset: int, size: tuple[int, ...], stride: tuple[int, ...], element_ratio: int = 1
) -> None:
    """Raise `NotPlainError` unless every element lies in its storage."""
    last = offset
    for num, step in zip(size, stride, strict=True):
        if num == 0:
            return
        last += (num - 1) * step
    if last >= ref.num_elements // element_ratio:
        raise NotPlainError(f"a tensor reaches past the end of storage {ref.key!r}")


class PlainObjects:
    """The parts of `plain.Builder` that need no storage."""

    def size(self, dims: tuple[int, ...]) -> Any:
        """A `torch.Size`."""
        return torch.Size(dims)

    def device(self, args: tuple[Any, ...]) -> Any:
        """A `torch.device`."""
        return torch.device(*args)

    def dtype(self, name: str) -> Any:
        """A `torch.dtype` by name, or None."""
        # Not `getattr`: torch imports hundreds of modules for names that it does not have yet.
        found = vars(torch).get(name)
        return found if isinstance(found, torch.dtype) else None


def element_type(ref: StorageRef, dtype: Any) -> tuple[torch.dtype, torch.dtype]:
    """(type the storage is counted in, type of the tensor); they differ for types that have no storage class."""
    counted = _COUNTED.get(ref.type_name)
    if counted is None or (
        dtype is not None and not (isinstance(dtype, torch.dtype) and ref.type_name == "UntypedStorage")
    ):
        raise NotPlainError(f"storage type {ref.type_name!r}")
    return counted, counted if dtype is None else dtype


class TensorBuilder(PlainObjects):
    """A `plain.Builder` that allocates storages and notes in `scatter` how to fill them."""

    def __init__(self, records: Mapping[str, Record], place: Place, *, name: str) -> None:
        self.scatter = Scatter()
        self._records = records
        self._place = place
        self._name = name
        self._devices: dict[str, torch.device] = {}
        self._storages: dict[str, torch.UntypedStorage] = {}

    def tensor(
        self,
        storage: StorageRef,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,
        dtype: Any,
    ) -> torch.Tensor:
        """A tensor on a storage that is shared with all others of the same key; filled once the scatter has run."""
        counted, actual = element_type(storage, dtype)
        check_inside(storage, offset, size, stride, 1 if dtype is None else actual.itemsize // counted.itemsize)
        untyped = self._storages.get(storage.key)
        if untyped is None:
            untyped = self._storages[storage.key] = self._allocate(storage, counted)
        elif storage.num_elements * counted.itemsize != untyped.nbytes():
            raise NotPlainError(f"storage {storage.key!r} has two sizes")
        tensor = torch.empty(0, dtype=actual, device=untyped.device).set_(untyped, offset, size, stride)
        if requires_grad:
            tensor.requires_grad_()
        return tensor

    def parameter(self, data: Any, requires_grad: bool) -> Any:
        """An `nn.Parameter` around `data`."""
        if not isinstance(data, torch.Tensor):
            raise NotPlainError("a parameter around no tensor")
        return torch.nn.Parameter(data, requires_grad)

    def _allocate(self, ref: StorageRef, counted: torch.dtype) -> torch.UntypedStorage:
        record = storage_extent(ref, self._records, counted, self._name)
        device = self._devices.get(ref.location)
        if device is None:
            device = self._devices[ref.location] = self._place(ref.location)
        untyped = new_storage(record.num_bytes, device)
        self.scatter.add(record.offset, record.num_bytes, untyped)
        return untyped
