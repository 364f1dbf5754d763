"""What a checkpoint file holds, from its header alone: tensors with key path, shape, dtype and extent. No torch, no
code run.

Guarantees:
- Reads the zip directory and `data.pkl`, or the safetensors header; never the tensors.
- Objects of any class are looked into and never made: no global named by a pickle is imported or called.
- A crafted file is an error in bounded time and memory: sizes are checked before they are used, and every extent lies
  inside the file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CorruptCheckpointError, UnsupportedStateError
from ..format.checksum import crc32
from ..format.inert import read_inert
from ..format.pickles import MalformedPickleError
from ..format.safetensors import read_safetensors
from ..format.tensors import MAX_OTHERS, MAX_TENSORS, FoundTensor, Inventory, OtherInfo, leaves, too_many
from ..format.zip_directory import Record, UnusualLayoutError, check_headers, read_directory
from .verified_file import VerifiedFile

MAX_PICKLE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: `offset` and `extent_bytes` bound its elements in the file, `num_bytes` is the size of its values."""

    path: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    num_bytes: int
    offset: int
    extent_bytes: int
    record: str
    """The zip record that holds its storage; "" in a safetensors file."""
    record_crc32: int | None
    covers_record: bool
    is_shared: bool
    """An earlier tensor has the same bytes (tied weights, views): totals count them once."""
    kind: str = ""
    """The class of the object around it (a tensor subclass, a quantized tensor); "" for a plain tensor."""
    key: tuple[str, ...] = ()
    """Its key path, whole: two tensors of one file may have the same `name`, none the same key."""
    is_conj: bool = False
    is_neg: bool = False
    """Its values are those of its bytes, conjugated or negated."""
    extra: str = ""
    """A checksum of what belongs to its value besides the elements (a scale, attributes); "" for a plain tensor."""

    @property
    def name(self) -> str:
        """The key path, with dots."""
        return ".".join(self.path)


@dataclass(frozen=True, slots=True)
class FileHeader:
    """One file: its tensors in the order of its structure; `num_others` leaves are no tensors, `others` are the first
    of them."""

    tensors: tuple[TensorInfo, ...]
    num_others: int
    records: dict[str, Record]
    others: tuple[OtherInfo, ...] = ()
    rest: str = ""
    """A checksum of the values behind those in `others`."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, shared ones once."""
        return sum(tensor.num_bytes for tensor in self.tensors if not tensor.is_shared)


def read_header(file: VerifiedFile) -> FileHeader:
    """The header of an open file of format "torch" or "safetensors". Blocks for small reads; any thread.

    Raises:
        CorruptCheckpointError: malformed, or an extent outside the file.
        UnsupportedStateError: more than a million tensors, an opaque file, or a zip file that torch did not write.
    """
    name = file.entry.path
    if file.entry.format == "safetensors":
        return _safetensors_header(file, name)
    if file.entry.format != "torch":
        raise UnsupportedStateError(f"{name} has format {file.entry.format!r}: it has no header that could be shown")
    records = read_records(file)
    pickled = records.get("data.pkl")
    if pickled is None:
        raise CorruptCheckpointError(f"{name} holds no data.pkl: it is no file of torch.save", path=name)
    if pickled.num_bytes > MAX_PICKLE_BYTES:
        raise CorruptCheckpointError(
            f"{name}: data.pkl has {pickled.num_bytes} bytes, at most {MAX_PICKLE_BYTES} are read",
            path=name,
            record="data.pkl",
        )
    raw = file.unverified(pickled.offset, pickled.num_bytes)
    if crc32(raw) != pickled.crc32:
        raise CorruptCheckpointError(f"{name}: the checksum of data.pkl is wrong", path=name, record="data.pkl")
    try:
        structure = read_inert(raw, Inventory(records))
    except MalformedPickleError as error:
        raise CorruptCheckpointError(
            f"{name}: data.pkl cannot be read: {error}", path=name, record="data.pkl"
        ) from error
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{name}: {error}", path=name, record=error.record) from error
    return _collect(structure, records, name)


def read_records(file: VerifiedFile) -> dict[str, Record]:
    """The records of a torch file, from the zip directory. Raises CorruptCheckpointError or UnsupportedStateError."""
    name = file.entry.path
    try:
        records = read_directory(file.unverified, file.size_bytes)
        check_headers(file.unverified, records)
    except UnusualLayoutError as error:
        raise UnsupportedStateError(f"{name} is no zip file as torch lays it out ({error})") from error
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{name}: {error}", path=name, record=error.record) from error
    return records


def _collect(structure: Any, records: dict[str, Record], name: str) -> FileHeader:
    tensors: list[TensorInfo] = []
    others: list[OtherInfo] = []
    seen_bytes: set[tuple[int, int]] = set()
    num_others = 0
    rest = hashlib.blake2b(digest_size=16)
    for path, key, leaf in leaves(structure):
        if not isinstance(leaf, FoundTensor):
            num_others += 1
            record = records.get(leaf.exact)
            if record is not None:
                leaf = replace(leaf, exact=f"{record.num_bytes} bytes {record.crc32:08x}")
            if len(others) < MAX_OTHERS:
                others.append(leaf)
            else:
                rest.update(repr(leaf).encode("utf-8", "surrogatepass"))
            continue
        if len(tensors) >= MAX_TENSORS:
            raise too_many(name)
        where = (leaf.offset, leaf.extent_bytes)
        tensors.append(
            TensorInfo(
                path=path,
                dtype=leaf.dtype,
                shape=leaf.shape,
                stride=leaf.stride,
                num_bytes=leaf.num_bytes,
                offset=leaf.offset,
                extent_bytes=leaf.extent_bytes,
                record=leaf.record,
                record_crc32=leaf.extent.crc32,
                covers_record=leaf.extent_bytes == leaf.extent.num_bytes,
                is_shared=where in seen_bytes and leaf.extent_bytes > 0,
                kind=leaf.kind,
                key=key,
                is_conj=leaf.is_conj,
                is_neg=leaf.is_neg,
                extra=leaf.extra,
            )
        )
        seen_bytes.add(where)
    return FileHeader(tuple(tensors), num_others, records, tuple(others), rest.hexdigest())


def _safetensors_header(file: VerifiedFile, name: str) -> FileHeader:
    tensors = [
        TensorInfo(
            path=tuple(tensor.name.split(".")),
            dtype=tensor.dtype,
            shape=tensor.shape,
            stride=tensor.stride,
            num_bytes=tensor.num_bytes,
            offset=tensor.offset,
            extent_bytes=tensor.num_bytes,
            record="",
            record_crc32=None,
            covers_record=False,
            is_shared=False,
            key=("s" + tensor.name,),
        )
        for tensor in read_safetensors(file.unverified, file.size_bytes, name=name)
    ]
    return FileHeader(tuple(sorted(tensors, key=lambda tensor: tensor.offset)), 0, {})
