"""The structure of a file whose tensors stay on disk: each says where its bytes are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..format.plain import NotPlainError, StorageRef, load_plain
from ..format.zip_directory import Record, UnusualLayoutError
from .build import PlainObjects, check_inside, element_type, storage_extent
from .safetensors_file import read_tensors
from .verified_file import VerifiedFile


@dataclass(eq=False, slots=True)
class FileTensor:
    """A tensor that is still on disk: geometry in elements, extents in file bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    first_byte: int
    storage_offset: int
    storage: Record
    requires_grad: bool = False
    is_parameter: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorsOnDisk(PlainObjects):
    """A `plain.Builder` that allocates nothing: tensors become `FileTensor`."""

    def __init__(self, records: Mapping[str, Record], *, name: str) -> None:
        self._records = records
        self._name = name

    def tensor(
        self,
        storage: StorageRef,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        requires_grad: bool,
        dtype: Any,
    ) -> FileTensor:
        """Where the tensor's bytes are."""
        counted, actual = element_type(storage, dtype)
        check_inside(storage, offset, size, stride, actual.itemsize // counted.itemsize)
        record = storage_extent(storage, self._records, counted, self._name)
        return FileTensor(actual, size, stride, record.offset + offset * actual.itemsize, offset, record, requires_grad)

    def parameter(self, data: Any, requires_grad: bool) -> Any:
        """The tensor inside, marked."""
        if not isinstance(data, FileTensor):
            raise NotPlainError("a parameter around no tensor")
        data.requires_grad, data.is_parameter = requires_grad, True
        return data


def read_inventory(file: VerifiedFile, records: Mapping[str, Record]) -> Any:
    """The file's structure with `FileTensor` leaves. Raises NotPlainError or UnusualLayoutError where only torch can
    read it."""
    pickled = records.get("data.pkl")
    if pickled is None:
        raise UnusualLayoutError("no data.pkl")
    return load_plain(file.view(pickled.offset, pickled.num_bytes), TensorsOnDisk(records, name=file.name))


def safetensors_inventory(file: VerifiedFile) -> dict[str, FileTensor]:
    """The flat structure of a safetensors file."""
    return {
        t.name: FileTensor(dtype, t.shape, t.stride, t.offset, 0, Record(t.offset, t.num_bytes, 0))
        for t, dtype in read_tensors(file)
    }
