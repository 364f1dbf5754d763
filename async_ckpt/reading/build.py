"""Reads a file's structure from its pickle or header, with tensors that stay on disk or that a `Scatter` fills.

Guarantees:
- A storage is allocated only after its size was found equal to its record's; all together are smaller than the file.
- No tensor reaches outside its storage.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from ..errors import UnsupportedStateError
from ..format.plain import Builder, NotPlainError, load_plain
from ..format.safetensors import read_safetensors
from ..format.tensors import TensorExtent
from ..format.zip_directory import HeaderCheck, Record, UnusualLayoutError, read_directory
from .scatter import Scatter, new_storage
from .verified_file import VerifiedFile

CPU = torch.device("cpu")
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
        return CPU
    # Only torch knows all tags; it validates the device and moves the (empty) storage there.
    moved = torch.serialization.default_restore_location(torch.UntypedStorage(0), tag)
    return torch.device(moved.device)


def read_structure(file: VerifiedFile, builder: Builder) -> Any:
    """What the file holds, its tensors made by `builder`; local headers are compared as the rest of it is read. Blocks.
    Raises NotPlainError, UnusualLayoutError: only torch can read it. CorruptCheckpointError: malformed.
    UnsupportedStateError: a safetensors file with a dtype that this version or torch does not know."""
    if file.entry.format == "safetensors":
        found = read_safetensors(file.view, file.size_bytes, name=file.name)
        try:
            return {tensor.name: builder.tensor(tensor) for tensor in found}
        except NotPlainError as error:
            raise UnsupportedStateError(f"{file.name}: {error}") from error
    records = read_directory(file.read, file.size_bytes)
    if byte_order(file, records) != sys.byteorder.encode():
        raise UnusualLayoutError("not this machine's byte order")
    file.on_bytes = HeaderCheck(records)
    pickled = records.get("data.pkl")
    if pickled is None:
        raise UnusualLayoutError("no data.pkl")
    return load_plain(file.view(pickled.offset, pickled.num_bytes), records, builder)


def byte_order(file: VerifiedFile, records: dict[str, Record]) -> bytes | None:
    """What the file says of its numbers' byte order; None where it says nothing."""
    order = records.get("byteorder")
    return None if order is None else file.read(order.offset, min(order.num_bytes, 16))


class TensorsOnDisk:
    """A `plain.Builder` that allocates nothing: tensors stay `TensorExtent`."""

    def tensor(self, extent: TensorExtent) -> Any:
        """The extent itself. Raises NotPlainError where torch lacks its dtype."""
        dtype_of(extent)
        return extent

    def parameter(self, data: Any, requires_grad: bool) -> Any:
        """The tensor inside, marked."""
        if not isinstance(data, TensorExtent):
            raise NotPlainError("a parameter around no tensor")
        data.requires_grad, data.is_parameter = requires_grad, True
        return data

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


class TensorBuilder(TensorsOnDisk):
    """A `plain.Builder` that allocates storages and notes in `scatter` how to fill them; tensors of one storage share
    it."""

    def __init__(self, place: Place) -> None:
        self.scatter = Scatter()
        self._place = place
        self._devices: dict[str, torch.device] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._storages: dict[tuple[int, int], torch.UntypedStorage] = {}

    def tensor(self, extent: TensorExtent) -> torch.Tensor:
        """A tensor on a storage that is shared with all others of the same record; filled once the scatter has run."""
        record = extent.storage
        # An empty one begins where the next one does.
        key = record.offset, record.num_bytes
        untyped = self._storages.get(key)
        if untyped is None:
            device = self._devices.get(extent.location)
            if device is None:
                device = self._devices[extent.location] = self._place(extent.location)
            untyped = self._storages[key] = new_storage(record.num_bytes, device)
            self.scatter.add(record.offset, record.num_bytes, untyped, fresh=True)
        dtype = self._dtypes.get(extent.dtype)
        if dtype is None:
            dtype = self._dtypes[extent.dtype] = dtype_of(extent)
        tensor: torch.Tensor = torch.empty(0, dtype=dtype, device=untyped.device).set_(
            untyped, extent.storage_offset, extent.shape, extent.stride
        )
        if extent.is_parameter:
            return torch.nn.Parameter(tensor, extent.requires_grad)
        return tensor.requires_grad_() if extent.requires_grad else tensor

    def parameter(self, data: Any, requires_grad: bool) -> Any:
        """An `nn.Parameter` around `data`."""
        if not isinstance(data, torch.Tensor):
            raise NotPlainError("a parameter around no tensor")
        return torch.nn.Parameter(data, requires_grad)


def dtype_of(source: TensorExtent | torch.Tensor) -> torch.dtype:
    """torch's dtype of its elements. Raises NotPlainError where this torch has none of that name."""
    if not isinstance(source, TensorExtent):
        return source.dtype
    found = vars(torch).get(source.dtype)
    if not isinstance(found, torch.dtype):
        raise NotPlainError(f"tensor {source.name!r} is {source.dtype}, which torch {torch.__version__} does not know")
    return found
