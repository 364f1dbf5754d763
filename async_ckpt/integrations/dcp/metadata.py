"""Writes DCP's `.metadata`, and reads it without running code: the pickle is read as plain data, and DCP's own classes
are filled from it.

Guarantees:
- Nothing named by the file is imported or called; the fields of every object have the types that DCP's planners rely
  on.
- Time and memory are linear in the file's size, and nothing recurses deeper than `_MAX_DEPTH`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import pickle
from collections import Counter
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

from ...errors import CorruptCheckpointError
from ...format.inert import Inert, MalformedPickleError, Name, key_value
from ...format.manifest import FileEntry
from ...format.pickles import read_inert
from ...host.memory import collector_paused
from .blobs import Extent

_MAX_DEPTH = 100
# A tensor has at most 64; one number more per reference to a tuple would make memory quadratic in the file's size.
_MAX_DIMS = 64
_MAX_ALIKE = 64

_DATACLASSES = {
    f"{kind.__module__}.{kind.__name__}": kind
    for kind in (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        StorageMeta,
        TensorStorageMetadata,
        _StorageInfo,
    )
}
_METADATA = f"{Metadata.__module__}.Metadata"
_PROPERTIES = f"{TensorProperties.__module__}.TensorProperties"
_MEMORY_FORMAT = f"{TensorProperties.__module__}._MEM_FORMAT_ENCODING"
_PATHS = ("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.Path", "pathlib._local.PosixPath")


def write_results(items: list[tuple[Any, Extent]], file_name: str, entry: FileEntry | None) -> list[WriteResult]:
    """What DCP passes on to `finish`: where each item lies; with the first one, the file's entry for the manifest."""
    places = [(item, _StorageInfo(file_name, extent.offset, extent.length)) for item, extent in items]
    return [WriteResult(item.index, info.length, (info, None if k else entry)) for k, (item, info) in enumerate(places)]


def encode_metadata(metadata: Metadata, results: list[list[WriteResult]], meta: StorageMeta | None) -> bytes:
    """The bytes of `.metadata`, in the stock form."""
    metadata.storage_data = {result.index: result.storage_data[0] for per_rank in results for result in per_rank}
    metadata.storage_meta = meta
    if hasattr(metadata, "version"):
        metadata.version = getattr(filesystem, "CURRENT_DCP_VERSION", None)
    return pickle.dumps(metadata)


def decode_metadata(raw: bytes, *, source: str) -> Metadata:
    """The `Metadata` in `raw`. Raises CorruptCheckpointError: it is none, or names anything else; nothing was run."""
    try:
        with collector_paused():
            metadata = _Builder().value(read_inert(raw), 0)
    except (MalformedPickleError, ValueError, TypeError, LookupError, OverflowError) as error:
        raise CorruptCheckpointError(f"{source} is not readable as DCP metadata: {error}", path=source) from error
    if not isinstance(metadata, Metadata):
        raise CorruptCheckpointError(f"{source} holds no DCP metadata", path=source)
    return metadata


class _Builder:
    """Makes DCP's objects; what the pickle refers to twice is made once. Every failure is a ValueError or its like."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self._good_chunks: set[tuple[int, int]] = set()

    def value(self, node: Any, depth: int) -> Any:
        """The object that a node of the inert structure stands for."""
        if isinstance(node, (str, int, float, bytes, type(None))):
            return node
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {_MAX_DEPTH}")
        if id(node) not in self._made:
            self._made[id(node)] = self._make(node, depth + 1)
        return self._made[id(node)]

    def _make(self, node: Any, depth: int) -> Any:
        if isinstance(node, (list, tuple)):
            return type(node)(self.value(item, depth) for item in node)
        if isinstance(node, dict):
            keys = [self.value(key_value(key), depth) for key in node]
            # Hashes of numbers are easily made equal, and each such key would be compared with all the others.
            if max(Counter(map(hash, keys)).values(), default=0) > _MAX_ALIKE:
                raise ValueError("it has keys that were made to have one hash")
            return dict(zip(keys, [self.value(value, depth) for value in node.values()], strict=True))
        if isinstance(node, Name):
            found = vars(torch).get(node.text.removeprefix("torch."))
            if isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
                return found
        if isinstance(node, Inert):
            return self._object(node, depth)
        raise ValueError(f"it names {getattr(node, 'text', node)!r}, which DCP metadata does not hold")

    def _object(self, node: Inert, depth: int) -> Any:
        kind, args = node.name, tuple(self.value(arg, depth) for arg in node.args[: _MAX_DIMS + 1])
        if kind == _METADATA and depth > 1:
            raise ValueError("it holds metadata inside metadata")
        if kind in _DATACLASSES:
            made = _filled(_DATACLASSES[kind], self.value(node.state, depth))
            if isinstance(made, TensorStorageMetadata):
                self._check_chunks(made)
            return made
        if kind == _PROPERTIES:
            return _properties(self.value(node.state, depth))
        if kind == "torch.Size":
            return _size(args)
        if kind == "torch.serialization._get_layout" and len(args) == 1 and isinstance(args[0], str):
            return self.value(Name(args[0]), depth)
        if kind == _MEMORY_FORMAT:
            return _MEM_FORMAT_ENCODING(*args)
        if kind == "torch.device" and all(isinstance(arg, (str, int)) for arg in args):
            return str(args[0])
        if kind in _PATHS and all(isinstance(arg, str) for arg in args):
            return pathlib.PurePosixPath(*args)
        raise ValueError(f"it names {kind!r}, which DCP metadata does not hold")

    def _check_chunks(self, made: TensorStorageMetadata) -> None:
        # Once for a list that many tensors share.
        key = (id(made.chunks), len(made.size))
        if key not in self._good_chunks:
            if not all(
                isinstance(chunk, ChunkStorageMetadata) and len(chunk.sizes) == len(made.size) for chunk in made.chunks
            ):
                raise ValueError("a tensor has chunks of other dimensions")
            self._good_chunks.add(key)


def _filled(kind: Any, state: Any) -> Any:
    """An object of a dataclass with these fields, types checked; fields of other torch versions are dropped."""
    made = object.__new__(kind)
    given = state if isinstance(state, dict) else {}
    for field in dataclasses.fields(kind):
        if field.name in given:
            value = given[field.name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            raise ValueError(f"{kind.__name__} has no {field.name}")
        object.__setattr__(made, field.name, value)
    if not _is_well_typed(made):
        raise ValueError(f"{kind.__name__} has a field of a wrong type")
    return made


def _size(args: tuple[Any, ...]) -> torch.Size:
    dims = args[0] if args else ()
    if len(args) > 1 or not isinstance(dims, (tuple, list)) or len(dims) > _MAX_DIMS or not all(map(_is_count, dims)):
        raise ValueError("a size is no short tuple of whole numbers")
    return torch.Size(dims)


def _properties(state: Any) -> TensorProperties:
    match state:
        case tuple((torch.dtype(), torch.layout(), bool(), _MEM_FORMAT_ENCODING(), bool())):
            made = object.__new__(TensorProperties)
            made.__setstate__(state)
            return made
    raise ValueError("TensorProperties has a field of a wrong type")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_well_typed(made: Any) -> bool:
    match made:
        case ChunkStorageMetadata(offsets=torch.Size() as offsets, sizes=torch.Size() as sizes):
            return len(offsets) == len(sizes)
        case MetadataIndex(fqn=str(), offset=torch.Size() | None, index=index):
            return index is None or _is_count(index)
        case _StorageInfo(relative_path=str(), offset=offset, length=length):
            return _is_count(offset) and _is_count(length)
        case Metadata(
            state_dict_metadata=dict() as described, storage_data=dict() as stored, storage_meta=StorageMeta() | None
        ):
            kinds = (TensorStorageMetadata, BytesStorageMetadata)
            good = all(isinstance(name, str) and isinstance(known, kinds) for name, known in described.items())
            return good and all(
                isinstance(index, MetadataIndex) and isinstance(info, _StorageInfo) for index, info in stored.items()
            )
        case (
            TensorStorageMetadata(properties=TensorProperties(), size=torch.Size(), chunks=list())
            | BytesStorageMetadata()
            | StorageMeta()
        ):
            return True
    return False
