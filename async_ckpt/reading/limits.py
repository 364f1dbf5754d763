"""Small files that would become large in memory, refused before torch's restricted unpickler sees them. No torch here.

That unpickler runs no foreign code, but expands compressed records, makes a ``bytearray``, a storage or an old-style
tensor as long as the pickle says, copies what is referred to, and hashes keys however deep they are.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import CorruptCheckpointError
from ..format.inert import describe, read_inert
from ..format.pickles import MalformedPickleError, Name
from ..format.zip_directory import Record, read_directory
from .extents import VerifiedFile

_MADE_BY_LENGTH = re.compile(r"torch\.(?:(?:cuda\.|sparse\.)*\w*Tensor|storage\.(?:Unt|T)ypedStorage)")
"""What torch itself never pickles as a call."""


def refuse_bombs(file: VerifiedFile) -> None:
    """Blocks for the directory and the pickle; about half as long as that unpickler takes.

    Raises:
        CorruptCheckpointError: it is one, or no container that `torch.save` has written.
    """
    for record in _directory(file):
        if record.name.endswith("data.pkl"):
            refuse_length(file.read(record.offset, record.nbytes), file.name, record.name)


def _directory(file: VerifiedFile) -> list[Record]:
    try:
        return read_directory(file.unverified, file.size_bytes)
    except CorruptCheckpointError as error:
        # Damage is told as damage, with the record's name.
        file.verify_rest()
        raise CorruptCheckpointError(f"{file.name}: {error}", path=file.name, record=error.record) from error


def refuse_length(pickled: bytes, path: str, record: str) -> None:
    """Refuse a pickle that makes objects by their length, or that is beyond the bounds of `format.pickles`.

    Raises:
        CorruptCheckpointError: it does, or is no pickle.
    """

    def call(name: str, args: tuple[Any, ...]) -> None:
        is_length = name.endswith(".bytearray") and any(isinstance(arg, int) for arg in args)
        if is_length or (args and _MADE_BY_LENGTH.fullmatch(name)):
            what = f"record {record!r} asks {describe(Name(name))} for memory that it does not hold ({describe(args)})"
            raise CorruptCheckpointError(f"{path}: {what}", path=path, record=record)

    try:
        read_inert(pickled, call)
    except MalformedPickleError as error:
        raise CorruptCheckpointError(f"{path}: record {record!r} is no pickle that is read: {error}", path=path, record=record) from error
