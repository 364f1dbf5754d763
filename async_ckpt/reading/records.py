"""What the records of a file tell without torch: what it holds, which are damaged, and whether torch may read it.

Guarantees:
- A header is read from the zip directory and `data.pkl`, or the safetensors header; never from the tensors.
- Objects of any class are looked into and never made: no global named by a pickle is imported or called.
- A crafted file is an error in bounded time and memory: sizes are checked before they are used, and every extent lies
  inside the file.

torch's restricted unpickler runs no foreign code, but expands compressed records, makes a ``bytearray``, a storage, an
old-style tensor or (where it may) an array as long as the pickle says, copies what is referred to, and hashes keys
however deep they are: small files that would become large in memory are refused before it sees them.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import CheckpointError, CorruptCheckpointError, UnsupportedStateError, some_of
from ..format.checksum import crc32
from ..format.inert import Inert, Notes, describe, printable
from ..format.opcodes import EVERY_OPCODE
from ..format.pickles import MalformedPickleError, Name, PickleReader
from ..format.safetensors import read_safetensors
from ..format.tensors import ITEM_BYTES, MAX_OTHERS, MAX_TENSORS, STORAGE_TYPES, OtherInfo, TensorExtent, leaves
from ..format.zip_directory import Record, UnusualLayoutError, check_headers, read_directory
from .errors import ExtentMismatch
from .verified_file import BLOCK_BYTES, VerifiedFile

_MAX_SUMMED = 64
_MAX_NAMED = 3
_MAX_PICKLE_BYTES = 256 << 20
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
"""How files begin that torch wrote before its zip format, and still writes on request."""
_MAX_LEGACY_PICKLES_BYTES = 64 << 20
_MADE_BY_LENGTH = re.compile(r"torch\.(?:(?:cuda\.|sparse\.)*\w*Tensor|storage\.(?:Unt|T)ypedStorage)")
"""What torch itself never pickles as a call."""
_CALLERS = ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type")
"""What calls another function by name; torch nests it once."""
_MAX_CALLERS = 4
_MAX_QUANTIZED = 1 << 32
"""Elements of one quantized tensor: torch makes room for them before it looks at the storage."""


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
    """The header of an open file. Blocks for small reads. Raises CorruptCheckpointError: malformed, or an extent
    outside the file. UnsupportedStateError: more than a million tensors, an opaque file, or a zip file that torch did
    not write."""
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
        if pickled.num_bytes > _MAX_PICKLE_BYTES:
            what = f"data.pkl has {pickled.num_bytes} bytes, at most {_MAX_PICKLE_BYTES} are read"
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


@contextlib.contextmanager
def naming(file: VerifiedFile) -> Iterator[None]:
    """Let errors pass with the file's name added, and the record's where it can be told, which reads the records."""
    try:
        yield
    except ExtentMismatch as mismatch:
        record = damaged_records(file, mismatch.extent)
        if record is None:
            raise
        named = ExtentMismatch(file.name, mismatch.extent, file.extent_range(mismatch.extent), record)
        named.consequence = mismatch.consequence
        raise named from mismatch
    except CorruptCheckpointError as error:
        if error.path is not None:
            raise
        raise CorruptCheckpointError(f"{file.name}: {error}", path=file.name, record=error.record) from error


def damaged_records(file: VerifiedFile, extent: int) -> str | None:
    """The records that touch an extent, narrowed to those whose own CRC fails; None if unknown. Blocks for them."""
    if file.entry.format == "safetensors":
        return None
    first, end = file.extent_range(extent)
    try:
        records = read_directory(file.unverified, file.size_bytes)
        touching = [
            name for name, record in records.items() if record.offset < end and record.offset + record.num_bytes > first
        ]
        summed = [(name, records[name]) for name in touching[:_MAX_SUMMED]]
        broken = [name for name, it in summed if range_crc(file, it.offset, it.num_bytes) != it.crc32]
    except (CheckpointError, UnusualLayoutError):
        # The directory is damaged too (or there is none): the byte range has to do.
        return None
    return some_of(broken or touching, _MAX_NAMED) or None


def range_crc(file: VerifiedFile, offset: int, num_bytes: int) -> int:
    """The CRC-32 of bytes as they are on disk, compared with nothing. Blocks for them."""
    crc = 0
    for done in range(0, num_bytes, BLOCK_BYTES):
        crc = crc32(file.unverified(offset + done, min(BLOCK_BYTES, num_bytes - done)), crc)
    return crc


def _is_huge(size: Any) -> bool:
    if isinstance(size, Inert) and size.args:
        size = size.args[0]
    num = 1
    for dim in size if isinstance(size, (tuple, list)) else ():
        num *= dim if type(dim) is int else 1
        if abs(num) > _MAX_QUANTIZED:
            return True
    return False


class _Suspicious(Notes):
    """Refuses calls that make objects by their length, and adds up the storages that the pickle names."""

    def __init__(self, path: str, record: str) -> None:
        super().__init__()
        self._path = path
        self._record = record
        self.storage_bytes: dict[Any, int] = {}

    def known(self, name: str, args: tuple[Any, ...]) -> Any:
        made, given, depth = name, args, 0
        while depth < _MAX_CALLERS and made in _CALLERS and len(given) > 2 and type(given[2]) is tuple:
            made, given, depth = describe(given[0]).strip("<>"), given[2], depth + 1
        is_length = made.endswith((".bytearray", ".bytes")) and any(isinstance(arg, int) for arg in given)
        is_size = made == "torch._utils._rebuild_qtensor" and len(given) > 2 and _is_huge(given[2])
        # NumPy makes an empty array, and fills it from bytes that are there.
        is_size = is_size or (made.endswith("multiarray._reconstruct") and given[1:2] != ((0,),))
        if is_length or is_size or depth == _MAX_CALLERS or (given and _MADE_BY_LENGTH.fullmatch(made)):
            what = f"asks <{printable(made)}> for memory that it does not hold ({describe(given)})"
            raise CorruptCheckpointError(
                f"{self._path}: record {self._record!r} {what}", path=self._path, record=self._record
            )
        return super().known(name, args)

    def persistent(self, value: Any) -> Any:
        is_storage = isinstance(value, tuple) and len(value) >= 5 and isinstance(value[1], Name)
        if is_storage and type(value[2]) is str and type(value[4]) is int:
            item_bytes = ITEM_BYTES.get(STORAGE_TYPES.get(value[1].text.rpartition(".")[2], ""), 16)
            self.storage_bytes[value[2]] = value[4] * item_bytes
        return super().persistent(value)


def torch_records(file: VerifiedFile) -> dict[str, Record]:
    """As `read_records`, to give the file to torch. Raises CorruptCheckpointError: `torch.save` has not written it."""
    try:
        return read_records(file)
    except (CorruptCheckpointError, UnsupportedStateError) as error:
        # Damage is told as damage, with the record's name.
        file.verify_rest()
        raise CorruptCheckpointError(f"{file.name} is no file of torch.save: {error}", path=file.name) from error


def refuse_beyond_limits(file: VerifiedFile, records: Mapping[str, Record]) -> None:
    """Raises CorruptCheckpointError: its pickle would become large. Takes about half as long as that unpickler does."""
    for name, record in records.items():
        if name.endswith("data.pkl"):
            refuse_length(file.read(record.offset, record.num_bytes), file.name, name)


def refuse_length(pickled: bytes | memoryview, path: str, record: str, maker: Notes | None = None) -> int:
    """The length of a pickle. Raises CorruptCheckpointError: it makes objects by their length, is beyond the bounds of
    `format.pickles`, or no pickle."""
    reader = PickleReader(pickled, maker or _Suspicious(path, record), EVERY_OPCODE)
    try:
        reader.read()
    except MalformedPickleError as error:
        message = f"{path}: record {record!r} is no pickle that is read: {error}"
        raise CorruptCheckpointError(message, path=path, record=record) from error
    return reader.position


def refuse_legacy_beyond_limits(file: VerifiedFile) -> None:
    """As `refuse_beyond_limits`, of a file in torch's old format (five pickles, then the storages), which must not name
    larger storages than itself."""
    pickles = file.read(0, min(file.size_bytes, _MAX_LEGACY_PICKLES_BYTES))
    maker = _Suspicious(file.name, "the legacy file")
    for _ in range(5):
        pickles = pickles[refuse_length(pickles, file.name, "the legacy file", maker) :]
    if sum(maker.storage_bytes.values()) > file.size_bytes:
        raise CorruptCheckpointError(
            f"{file.name}: its pickle names storages that are larger than the file", path=file.name
        )
