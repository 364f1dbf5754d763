"""Small files that would become large in memory, refused before torch's restricted unpickler sees them. No torch here.

That unpickler runs no foreign code, but expands compressed records, makes a ``bytearray``, a storage or an old-style
tensor as long as the pickle says, copies what is referred to, and hashes keys however deep they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import CorruptCheckpointError, UnsupportedStateError
from ..format.inert import Inert, Notes, describe, printable
from ..format.opcodes import EVERY_OPCODE
from ..format.pickles import MalformedPickleError, Name, PickleReader
from ..format.tensors import ITEM_BYTES, STORAGE_TYPES
from ..format.zip_directory import Record
from .header import read_records
from .verified_file import VerifiedFile

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
    """Makes notes, refuses calls that make objects by their length, and adds up the storages that the pickle names."""

    def __init__(self, path: str, record: str) -> None:
        super().__init__()
        self._path = path
        self._record = record
        self.storage_bytes: dict[Any, int] = {}

    def known(self, name: str, args: tuple[Any, ...]) -> Any:
        made, given, depth = name, args, 0
        while depth < _MAX_CALLERS and made in _CALLERS and len(given) > 2 and type(given[2]) is tuple:
            made, given, depth = describe(given[0]).strip("<>"), given[2], depth + 1
        is_length = made.endswith(".bytearray") and any(isinstance(arg, int) for arg in given)
        is_size = made == "torch._utils._rebuild_qtensor" and len(given) > 2 and _is_huge(given[2])
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
    """The records of a file of `torch.save`; torch reads the same ones. Blocks for the directory and the local headers.
    Raises CorruptCheckpointError: it is no container that `torch.save` has written."""
    try:
        return read_records(file)
    except (CorruptCheckpointError, UnsupportedStateError) as error:
        # Damage is told as damage, with the record's name.
        file.verify_rest()
        raise CorruptCheckpointError(f"{file.name} is no file of torch.save: {error}", path=file.name) from error


def refuse_beyond_limits(file: VerifiedFile, records: Mapping[str, Record]) -> None:
    """Blocks for the pickle; about half as long as that unpickler takes. Raises CorruptCheckpointError: it is one."""
    for name, record in records.items():
        if name.endswith("data.pkl"):
            refuse_length(file.read(record.offset, record.num_bytes), file.name, name)


def refuse_length(pickled: bytes, path: str, record: str, maker: Notes | None = None) -> int:
    """Refuse a pickle that makes objects by their length, or that is beyond the bounds of `format.pickles`; gives its
    length. Raises CorruptCheckpointError: it does, or is no pickle."""
    reader = PickleReader(pickled, maker or _Suspicious(path, record), EVERY_OPCODE)
    try:
        reader.read()
    except MalformedPickleError as error:
        message = f"{path}: record {record!r} is no pickle that is read: {error}"
        raise CorruptCheckpointError(message, path=path, record=record) from error
    return reader.position


def refuse_legacy_beyond_limits(file: VerifiedFile) -> None:
    """As `refuse_beyond_limits`, of a file in torch's old format: five pickles, then the storages. Raises
    CorruptCheckpointError: it is one, or its storages are larger than the file."""
    pickles = file.read(0, min(file.size_bytes, _MAX_LEGACY_PICKLES_BYTES))
    maker = _Suspicious(file.name, "the legacy file")
    for _ in range(5):
        pickles = pickles[refuse_length(pickles, file.name, "the legacy file", maker) :]
    if sum(maker.storage_bytes.values()) > file.size_bytes:
        raise CorruptCheckpointError(
            f"{file.name}: its pickle names storages that are larger than the file", path=file.name
        )
