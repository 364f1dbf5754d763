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

    def __init__(
        self, cause: OSError, *, path: str, offset: int | None = None, consequence: str = NOTHING_LOADED
    ) -> None:
        super().__init__(cause.errno, cause.strerror or str(cause))
        self.path = path
        self.offset = offset
        self.consequence = consequence

    def __str__(self) -> str:
        where = "" if self.offset is None else f" at offset {self.offset}"
        return f"cannot read {self.path}{where}: [Errno {self.errno}] {self.strerror}; {self.consequence}"


class ExtentMismatch(CorruptCheckpointError):
    """One extent's CRC differs from the manifest's; `first` and `end` bound it in the file."""

    def __init__(
        self, name: str, extent: int, first: int, end: int, record: str | None = None, consequence: str = NOTHING_LOADED
    ) -> None:
        where = f"record {record!r}" if record else f"bytes {first} to {end - 1}"
        super().__init__(
            f"{name} is damaged: the checksum of {where} differs from the one committed; {consequence}",
            path=name,
            record=record,
        )
        self.extent, self.first, self.end = extent, first, end
        self.consequence = consequence


@contextlib.contextmanager
def telling_overwritten() -> Iterator[None]:
    """Let errors of reading pass with what has become of the targets added."""
    try:
        yield
    except ExtentMismatch as error:
        raise ExtentMismatch(error.path or "", error.extent, error.first, error.end, consequence=OVERWRITTEN) from error
    except CorruptCheckpointError as error:
        raise CorruptCheckpointError(f"{error}; {OVERWRITTEN}", path=error.path, record=error.record) from error
    except ReadError as error:
        raise ReadError(error, path=error.path, offset=error.offset, consequence=OVERWRITTEN) from error
