"""The error tree: one root, and every class is also the builtin a caller would expect. And how people hear of what is
not raised.

Guarantees:
- Every message says what is on disk now, and what to do where there is something to do.
- The cause (an ``OSError``, the framework's own exception) is kept as ``__cause__``.
- Whoever catches the builtin (``OSError``, ``ValueError``, ``TimeoutError``, ...) catches ours too.
- Act, note, resolve, and only then `report`: it cannot raise, and it is the package's only way to log and to warn.
"""

from __future__ import annotations

import contextlib
import errno as _errno
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from typing import TypeGuard

_logger = logging.getLogger("async_ckpt")


def report(
    level: int,
    message: str,
    *args: object,
    cause: BaseException | None = None,
    warning: type[Warning] | None = None,
    stacklevel: int = 1,
) -> None:
    """Log `message % args` as "async_ckpt", or issue it as `warning`. Any thread; blocks for as long as the user's
    handlers do.

    Never raises, whatever handlers, filters, hooks and closed streams do, `BaseException` included: a message is never
    worth a checkpoint. A warning that is turned into an error, or that cannot be shown, is logged instead. The
    traceback of `cause` is logged too; `stacklevel` is as in `warnings.warn`.
    """
    if warning is not None:
        with contextlib.suppress(BaseException):
            warnings.warn(message % args, warning, stacklevel=stacklevel + 1)
            return
    with contextlib.suppress(BaseException):
        _logger.log(level, message, *args, exc_info=cause)


def ends_with_0(error: BaseException | None) -> bool:
    """Whether `error`, on its way out, would end the program with exit code 0: then it must not hide a failure."""
    return isinstance(error, SystemExit) and not error.code


def escaped(text: str) -> str:
    """`text` with everything that could steer a terminal, or mislead its reader, escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def some_of(names: Sequence[str], most: int = 5, *, show: Callable[[str], str] = str) -> str:
    """The first `most` of `names`, with commas, and how many more there are; "" where there are none."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(show, names[:most])) + more


class CheckpointError(Exception):
    """Root of every error this package raises on purpose. All of them can be pickled: other ranks and processes get
    them whole.
    """

    def __reduce__(self) -> tuple[object, ...]:
        cause = self.__cause__ if _is_picklable(self.__cause__) else None
        return _rebuild, (type(self), self.args, self.__dict__, cause)


def _rebuild(
    kind: type[CheckpointError], args: tuple[object, ...], attributes: dict[str, object], cause: BaseException | None
) -> CheckpointError:
    # The classes' own __init__ take other arguments than those that BaseException keeps.
    error = kind.__new__(kind, *args)
    (OSError if isinstance(error, OSError) else Exception).__init__(error, *args)
    error.__dict__.update(attributes)
    error.__cause__ = cause
    path = attributes.get("path")
    if isinstance(error, OSError) and path is not None:
        error.filename = path
    return error


def _is_picklable(cause: BaseException | None) -> bool:
    # Foreign exceptions may refuse; a builtin does not, and neither do ours.
    return type(cause).__module__ == "builtins" or isinstance(cause, CheckpointError)


class ConfigError(CheckpointError, ValueError):
    """A configuration field has a wrong name, type, unit or combination; the message names the field and the fix."""


def check_int(name: str, value: object, low: int = 1, high: int | None = None, hint: str = "") -> None:
    """Refuse what is no integer from `low` on (to `high`). Raises ConfigError: says what `name` is to be."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bounds = "a positive integer" if high is None else f"an integer{hint} from {low} to {high}"
        raise ConfigError(f"{name} must be {bounds}, not {value!r}")


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether `value` is an integer or a float, and neither a bool nor NaN."""
    if isinstance(value, float):
        return not math.isnan(value)
    # An integer may be too large for any float.
    return isinstance(value, int) and not isinstance(value, bool)


def check_positive(name: str, value: object, what: str = "number of seconds") -> None:
    """Refuse what is no positive, finite number. Raises ConfigError: says what `name` is to be."""
    if not is_number(value) or not 0 < value < float("inf"):
        raise ConfigError(f"{name} must be a positive {what}, not {value!r}")


class TransactionStateError(CheckpointError, RuntimeError):
    """A call came in the wrong order (save without create, commit twice, use after close, use in a forked child)."""


class UnsupportedStateError(CheckpointError, TypeError):
    """The state holds something that cannot be saved; the message names its key path. Nothing was written."""


class TornSnapshotError(CheckpointError, RuntimeError):
    """Tensors changed between `save` and the end of their copy, or were named as frozen and have changed; the message
    names them. Nothing is committed.
    """

    def __init__(self, message: str, tensors: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.tensors = tensors


class BackpressureTimeout(CheckpointError, TimeoutError):
    """`save`, `commit` or `close` waited for the disk longer than it was allowed to; the message says for what."""


class _DiskError(CheckpointError, OSError):
    def __init__(self, message: str, errno: int | None, path: str | None) -> None:
        super().__init__(errno if errno is not None else _errno.EIO, message)
        self.message = message
        self.path = path
        if path is not None:
            self.filename = path


class WriteError(_DiskError):
    """A file operation failed while a checkpoint was being written; keeps path, offset and errno."""

    def __init__(
        self, message: str, *, errno: int | None = None, path: str | None = None, offset: int | None = None
    ) -> None:
        super().__init__(message, errno, path)
        self.offset = offset

    def __str__(self) -> str:
        at = "" if self.offset is None else f", offset {self.offset}"
        where = "" if self.path is None else f" [path {self.path!r}{at}]"
        code = _errno.errorcode.get(self.errno or 0, "no errno")
        return f"{self.message}{where} ({code}: {os.strerror(self.errno or 0)})"


class OutOfSpaceError(WriteError):
    """The disk or the quota is full; says how many bytes were needed and how many are free (None: unknown)."""

    def __init__(
        self,
        message: str,
        *,
        errno: int | None = _errno.ENOSPC,
        path: str | None = None,
        offset: int | None = None,
        needed_bytes: int | None = None,
        free_bytes: int | None = None,
    ) -> None:
        super().__init__(message, errno=errno, path=path, offset=offset)
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class CommitError(_DiskError):
    """A step of the commit failed; says which step and what is on disk now.

    `committed` is False when the tag is certainly not visible, None when it is unknown
    (only the last directory sync failed, after the rename): list the root to learn it.
    """

    def __init__(
        self,
        message: str,
        *,
        step: str,
        errno: int | None = None,
        path: str | None = None,
        committed: bool | None = False,
    ) -> None:
        super().__init__(message, errno, path)
        self.step = step
        self.committed = committed

    def __str__(self) -> str:
        return f"commit failed at step '{self.step}': {self.message}"


class TagExistsError(CommitError, FileExistsError):
    """The tag is committed already and `overwrite` is "refuse"; it was left as it is."""


class PathExistsError(CheckpointError, FileExistsError):
    """A path was saved or made already; the first one is kept as it is."""


class RankFailedError(CommitError):
    """Another rank failed, vanished or disagreed; nothing was renamed on any rank."""

    def __init__(self, message: str, *, rank: int | None, step: str = "ranks") -> None:
        super().__init__(message, step=step)
        self.rank = rank


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """No committed checkpoint, or no such file in it; the message says what is there instead."""


class CorruptCheckpointError(CheckpointError, ValueError):
    """Bytes on disk are not those that were committed; names the file and, where known, the record.

    What the file itself says (names of records, types) is escaped: it may have been made to steer a terminal.
    """

    def __init__(self, message: str, *, path: str | None = None, record: str | None = None) -> None:
        super().__init__(escaped(message))
        self.path = path
        self.record = None if record is None else escaped(record)


class MirrorError(CheckpointError, OSError):
    """A mirror could not be written or read; says what the store holds now. Local checkpoints are untouched."""

    def __init__(self, message: str, *, url: str) -> None:
        # Not EIO: a store that cannot be reached is no damage of what it holds.
        super().__init__(_errno.ECONNABORTED, message)
        self.message = message
        self.url = url

    def __str__(self) -> str:
        return f"{self.message} [{self.url}]"


class UnsafePathError(CheckpointError, ValueError):
    """A tag or path is malformed or would leave the checkpoint root; nothing was touched."""


class StateMismatchError(CheckpointError, ValueError):
    """`load_into` found names, shapes or dtypes that do not match; lists all of them. No byte was moved."""

    def __init__(self, message: str, mismatches: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.mismatches = mismatches
