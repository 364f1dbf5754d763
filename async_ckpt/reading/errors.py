"""What reading a committed file can raise: the disk failed, or the bytes are not those that were committed. No
torch."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from ..errors import CheckpointError, CorruptCheckpointError

NOTHING_LOADED = "nothing was loaded"
OVERWRITTEN = "the given tensors are partly overwritten"
DAMAGE_ERRNOS = frozenset({errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA, errno.EREMOTEIO})
"""The disk or the kernel says that the data is bad: damage, and no passing state (EMFILE, ENOMEM, a server's
ESTALE)."""


class ReadError(CheckpointError, OSError):
    """The disk failed while a checkpoint was read; keeps path, offset and errno."""

    consequence = NOTHING_LOADED

    def __init__(self, cause: OSError, *, path: str, offset: int | None = None) -> None:
        super().__init__(cause.errno, cause.strerror or str(cause))
        self.path = path
        self.offset = offset

    def __str__(self) -> str:
        where = "" if self.offset is None else f" at offset {self.offset}"
        return f"cannot read {self.path}{where}: [Errno {self.errno}] {self.strerror}; {self.consequence}"


class ExtentMismatch(CorruptCheckpointError):
    """The CRC of one extent, file bytes [first, end), differs from the manifest's."""

    consequence = NOTHING_LOADED

    def __init__(self, name: str, extent: int, first_end: tuple[int, int], record: str | None = None) -> None:
        first, end = first_end
        where = f"record {record!r}" if record else f"bytes {first} to {end - 1}"
        super().__init__(
            f"{name} is damaged: the checksum of {where} differs from the one committed", path=name, record=record
        )
        self.extent = extent

    def __str__(self) -> str:
        return f"{self.args[0]}; {self.consequence}"


@contextlib.contextmanager
def telling_overwritten() -> Iterator[None]:
    """Let errors of reading pass with what has become of the targets added."""
    try:
        yield
    except (ExtentMismatch, ReadError) as error:
        error.consequence = OVERWRITTEN
        raise
    except CorruptCheckpointError as error:
        error.args = (f"{error}; {OVERWRITTEN}",)
        raise
