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

from ..errors import CorruptCheckpointError, UnsupportedStateError
from ..format.checksum import crc32
from ..format.pickles import MalformedPickleError
from ..format.safetensors import read_safetensors
from ..format.tensors import MAX_OTHERS, MAX_TENSORS, OtherInfo, TensorExtent, leaves
from ..format.zip_directory import Record, UnusualLayoutError, check_headers, read_directory
from .damage import naming
from .verified_file import VerifiedFile

MAX_PICKLE_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class FileHeader:
    """One file: its tensors in the order of its structure; `num_others` leaves are no tensors, `others` are the first
    of them."""

    tensors: tuple[TensorExtent, ...]
    num_others: int = 0
    others: tuple[OtherInfo, ...] = ()
    rest: str = ""
    """A checksum of the values behind those in `others`."""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors, shared ones once."""
        return sum(tensor.num_bytes for tensor in self.tensors if not tensor.is_shared)


def read_header(file: VerifiedFile) -> FileHeader:
    """The header of an open file of format "torch" or "safetensors". Blocks for small reads; any thread. Raises
    CorruptCheckpointError: malformed, or an extent outside the file. UnsupportedStateError: more than a million
    tensors, an opaque file, or a zip file that torch did not write."""
    name = file.name
    if file.entry.format == "safetensors":
        found = read_safetensors(file.unverified, file.size_bytes, name=name)
        return FileHeader(tuple(sorted(found, key=lambda tensor: tensor.offset)))
    if file.entry.format != "torch":
        raise UnsupportedStateError(f"{name} has format {file.entry.format!r}: it has no header that could be shown")
    records = read_records(file)
    with naming(file):
        pickled = records.get("data.pkl")
        if pickled is None:
            raise CorruptCheckpointError("no data.pkl: it is no file of torch.save")
        if pickled.num_bytes > MAX_PICKLE_BYTES:
            what = f"data.pkl has {pickled.num_bytes} bytes, at most {MAX_PICKLE_BYTES} are read"
            raise CorruptCheckpointError(what, record="data.pkl")
        raw = file.unverified(pickled.offset, pickled.num_bytes)
        if crc32(raw) != pickled.crc32:
            raise CorruptCheckpointError("the checksum of data.pkl is wrong", record="data.pkl")
        try:
            return _header_of(raw, records)
        except MalformedPickleError as error:
            raise CorruptCheckpointError(f"data.pkl cannot be read: {error}", record="data.pkl") from error


def _header_of(pickled: bytes, records: dict[str, Record]) -> FileHeader:
    tensors: list[TensorExtent] = []
    others: list[OtherInfo] = []
    seen_bytes: set[tuple[int, int]] = set()
    num_others = 0
    rest = hashlib.blake2b(digest_size=16)
    for leaf in leaves(pickled, records):
        if isinstance(leaf, TensorExtent):
            if len(tensors) >= MAX_TENSORS:
                raise UnsupportedStateError(f"more than {MAX_TENSORS} tensors; --records shows what can be shown")
            where = (leaf.offset, leaf.extent_bytes)
            leaf.is_shared = where in seen_bytes and leaf.extent_bytes > 0
            tensors.append(leaf)
            seen_bytes.add(where)
            continue
        num_others += 1
        record = records.get(leaf.exact)
        if record is not None:
            leaf = replace(leaf, exact=f"{record.num_bytes} bytes {record.crc32:08x}")
        if len(others) < MAX_OTHERS:
            others.append(leaf)
        else:
            rest.update(repr(leaf).encode("utf-8", "surrogatepass"))
    return FileHeader(tuple(tensors), num_others, tuple(others), rest.hexdigest())


def read_records(file: VerifiedFile) -> dict[str, Record]:
    """The records of a torch file, from the zip directory and the local headers. Raises CorruptCheckpointError or
    UnsupportedStateError."""
    with naming(file):
        try:
            records = read_directory(file.unverified, file.size_bytes)
        except UnusualLayoutError as error:
            raise UnsupportedStateError(f"{file.name} is no zip file as torch lays it out ({error})") from error
        check_headers(file.unverified, records)
        return records
