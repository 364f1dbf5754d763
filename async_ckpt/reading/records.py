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
from ..format.inert import Inert, MalformedPickleError, Name, OpaqueKey, describe, printable
from ..format.pickles import PickleReader
from ..format.safetensors import read_safetensors
from ..format.tensors import (
    ITEM_BYTES,
    MAX_OTHERS,
    MAX_TENSORS,
    STORAGE_TYPES,
    OtherInfo,
    StorageRef,
    TensorExtent,
    leaves,
    storage_of,
    tensor_in,
)
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
_REBUILT = frozenset(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "qtensor"))
_BARE = _REBUILT | {"torch.Tensor"}
_MAX_ELEMENTS = 1 << 59
# What torch may write into the words of an error: values, and the characters of text.
_FREE_WORDS, _WORDS_PER_BYTE = 1 << 20, 16


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
    num = 1
    for dim in size if isinstance(size, (tuple, list)) else ():
        num *= dim if type(dim) is int else 1
        if abs(num) > _MAX_QUANTIZED:
            return True
    return False


class _Suspicious(PickleReader):
    """Refuses what torch's unpickler would take the word of: calls that make objects by their length, storages of
    another length than their records, tensors outside of their storages, text in another encoding, and arguments that
    grow when torch writes them out in an error."""

    def __init__(
        self,
        pickled: bytes | memoryview,
        path: str,
        record: str,
        records: Mapping[str, Record],
        said: dict[str, Record] | None = None,
    ) -> None:
        """`said`, of files in the old format, takes the storages, which are as long as they say."""
        super().__init__(pickled)
        self._path = path
        self._record = record
        self._words_left = _FREE_WORDS + _WORDS_PER_BYTE * len(pickled)
        self._records = records
        self._said = said

    def check(self) -> None:
        """Read it. Raises CorruptCheckpointError."""
        try:
            self.read()
        except MalformedPickleError as error:
            raise self._crafted(f"is no pickle that is read: {error}") from error
        except CorruptCheckpointError as error:
            if error.path is not None:
                raise
            raise CorruptCheckpointError(f"{self._path}: {error}", path=self._path, record=error.record) from error

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        todo: list[Any] = [function, args]
        while todo:
            value = todo.pop()
            is_sized = isinstance(value, (str, bytes, list, tuple, dict)) and type(value) is not StorageRef
            self._words_left -= 1 + (len(value) if is_sized else value.bit_length() >> 3 if type(value) is int else 0)
            if self._words_left < 0:
                raise MalformedPickleError("what it calls is given far more than all it holds")
            if isinstance(value, Inert):
                todo += [value.args, value.items, value.pairs]
            elif isinstance(value, dict):
                todo += [*value.keys(), *value.values()]
            elif is_sized and isinstance(value, (list, tuple)):
                todo += value
            elif type(value) is OpaqueKey:
                todo.append(value.value)
        return super().call(function, args)

    def known(self, name: str, args: tuple[Any, ...]) -> Any:
        made, given, depth = name, args, 0
        while depth < _MAX_CALLERS and made in _CALLERS and len(given) > 2 and type(given[2]) is tuple:
            made, given, depth = describe(given[0]).strip("<>"), given[2], depth + 1
        is_length = made.endswith((".bytearray", ".bytes")) and any(isinstance(arg, int) for arg in given)
        is_size = made == "torch._utils._rebuild_qtensor" and len(given) > 2 and _is_huge(given[2])
        # NumPy makes an empty array, and fills it from bytes that are there.
        is_size = is_size or (made.endswith("multiarray._reconstruct") and given[1:2] != ((0,),))
        is_size = is_size or made == "numpy.ndarray" or (made.endswith("multiarray.scalar") and len(given) != 2)
        if is_length or is_size or depth == _MAX_CALLERS or (given and _MADE_BY_LENGTH.fullmatch(made)):
            raise self._crafted(f"asks <{printable(made)}> for memory that it does not hold ({describe(given)})")
        if made == "_codecs.encode" and given[1:] != ("latin1",):
            raise self._crafted(f"encodes text as torch does not ({describe(given[1:])})")
        if made in _REBUILT and given and type(given[0]) is StorageRef:
            self._check_tensor(given)
        if name == "torch.Size" and len(args) == 1 and isinstance(args[0], (tuple, list)):
            # As a key, it is hashed like a tuple.
            return tuple(args[0])
        return super().known(name, args)

    def _check_tensor(self, given: tuple[Any, ...]) -> None:
        storage, offset, size, stride = (*given, None, None, None)[:4]
        dtype = given[6].text.removeprefix("torch.") if len(given) > 6 and isinstance(given[6], Name) else None
        size, stride = (tuple(part) if isinstance(part, list) else part for part in (size, stride))
        is_known = dtype is None or dtype in ITEM_BYTES
        if is_known and tensor_in(storage, offset, size, stride, dtype) is None:
            raise self._crafted(f"describes a tensor as torch does not ({describe(given[1:])})")

    def build(self, target: Any, state: Any) -> None:
        # Of a bare tensor, torch takes that for `Tensor.set_`, which makes its storage as long as it is told.
        if type(target) is Inert and target.name in _BARE and isinstance(state, (list, tuple)) and state:
            raise self._crafted("gives a tensor a state that torch does not write")
        super().build(target, state)

    def persistent(self, value: Any) -> Any:
        if not isinstance(value, tuple) or value[:1] == ("module",):
            return super().persistent(value)
        # In the old format, a sixth part says which part of the storage is meant.
        named = value[:5]
        if self._said is not None and len(named) == 5 and isinstance(named[1], Name):
            dtype = STORAGE_TYPES.get(named[1].text.rpartition(".")[2], "")
            num = named[4] if type(named[4]) is int else -1
            if type(named[2]) is str and dtype and 0 <= num < _MAX_ELEMENTS:
                self._said.setdefault(
                    f"data/{named[2]}", Record(0, num * ITEM_BYTES[dtype], 0, f"/{named[2]}".encode(errors="replace"))
                )
        found = storage_of(named, self._records if self._said is None else self._said)
        if found is None:
            raise self._crafted(f"names a storage as torch does not ({describe(value)})")
        return found

    def _crafted(self, what: str) -> CorruptCheckpointError:
        return CorruptCheckpointError(
            f"{self._path}: record {self._record!r} {what}", path=self._path, record=self._record
        )


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
            refuse_crafted(file.read(record.offset, record.num_bytes), file.name, name, records)


def refuse_crafted(pickled: bytes | memoryview, path: str, record: str, records: Mapping[str, Record]) -> None:
    """Raises CorruptCheckpointError: what it describes does not lie in the file's `records`, it makes objects by their
    length, is beyond the bounds of `format.pickles`, or no pickle."""
    _Suspicious(pickled, path, record, records).check()


def refuse_legacy_beyond_limits(file: VerifiedFile) -> None:
    """As `refuse_beyond_limits`, of a file in torch's old format (five pickles, then the storages), which must not name
    larger storages than itself."""
    pickles = file.read(0, min(file.size_bytes, _MAX_LEGACY_PICKLES_BYTES))
    said: dict[str, Record] = {}
    for _ in range(5):
        reader = _Suspicious(pickles, file.name, "the legacy file", {}, said)
        reader.check()
        pickles = pickles[reader.position :]
    if sum(record.num_bytes for record in said.values()) > file.size_bytes:
        raise CorruptCheckpointError(
            f"{file.name}: its pickle names storages that are larger than the file", path=file.name
        )
