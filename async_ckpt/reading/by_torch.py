"""Has torch read what only torch can read: other objects than plain tensors, mapped files, files in its old format.

torch is given verified bytes only, after what would hurt it was refused.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import re
import struct
import sys
from contextlib import AbstractContextManager
from mmap import MAP_PRIVATE
from typing import Any

import torch
from torch.serialization import LoadEndianness
from torch.utils.serialization import config

from ..errors import CheckpointError, ConfigError, CorruptCheckpointError, UnsupportedStateError, escaped
from ..format.named import refused_in
from ..host.memory import address_of, move
from .build import byte_order, place_for
from .errors import ReadError
from .records import LEGACY_MAGIC, refuse_beyond_limits, refuse_legacy_beyond_limits, torch_records
from .verified_file import VerifiedFile

_FILE_ERRORS = (
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    struct.error,
)
_MAX_SAID = 1000
_HELD_EXTENTS = 4
_ABOUT_FILES = "PytorchStreamReader|archive|unpickling|pickle"
_OF_THE_SYSTEM = r"errno (\d+) on fopen|unable to (?:open|mmap|stat).*\((\d+)\)"
"""What torch says of a failed system call."""
_ABOUT_MEMORY = r"(?i)alloc|memory"
_ABOUT_DEVICES = r"(?i)map_location|device|cuda|backend"
_NO_DEVICE = r"device\(\) received|Expected one of cpu|Invalid device string|Could not parse device"
"""What torch says where it is given no device at all."""


def load_by_torch(file: VerifiedFile, map_location: Any, weights_only: bool | None, *, mmap: bool = False) -> Any:
    """What ``torch.load`` makes of the file, read or mapped. Blocks until every byte was verified."""
    if mmap:
        _check_mapping(file)
        file.verify_rest()
    _refuse_crafted(file, map_location, weights_only)
    raised: list[BaseException] = []

    def place(storage: Any, location: str) -> Any:
        try:
            return map_location(storage, location)
        except BaseException as error:
            raised.append(error)
            raise

    source = TorchFile(file)
    # Mapped not by its name: the tag may be replaced, and what has that name then was not verified.
    given: Any = file.map_path if mmap else source
    where = place if callable(map_location) else map_location
    try:
        with _checking_sparse(map_location):
            state = torch.load(given, map_location=where, weights_only=weights_only, mmap=mmap)
    except Exception as error:
        if source.failure is not None:
            raise source.failure from None
        is_foreign = isinstance(error, CheckpointError) or any(error is one for one in raised)
        translated = None if is_foreign else _translation(file, error, runs_code(weights_only), map_location)
        if translated is None:
            raise
        raise translated from error
    file.verify_rest()
    return state


def _checking_sparse(map_location: Any) -> AbstractContextManager[Any]:
    """Have torch look at where the elements of sparse tensors lie: by default it does not, without data it cannot."""
    is_meta = isinstance(map_location, (str, torch.device)) and torch.device(map_location).type == "meta"
    has_data = not is_meta and torch._guards.detect_fake_mode(None) is None
    return torch.sparse.check_sparse_tensor_invariants() if has_data else contextlib.nullcontext()


def is_legacy(file: VerifiedFile) -> bool:
    """Whether it is in torch's old format. Raises UnsupportedStateError: it neither is nor looks like a torch file."""
    head = file.read(0, min(len(LEGACY_MAGIC), file.size_bytes))
    if file.entry.format == "opaque" and head != LEGACY_MAGIC and not head.startswith(b"PK"):
        raise UnsupportedStateError(
            f"{file.name} was saved as bytes and is no state that could be loaded; read it at its path"
        )
    return head == LEGACY_MAGIC


def runs_code(weights_only: bool | None) -> bool:
    """Whether torch, told this, runs the pickle's code: its environment variables have their say. Raises ConfigError:
    they contradict each other."""
    forced, freed = (
        os.environ.get(name, "0").lower() in ("1", "y", "yes", "true")
        for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    )
    if forced and freed:
        raise ConfigError(
            "TORCH_FORCE_WEIGHTS_ONLY_LOAD and TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD are both set: unset one of them; "
            "nothing was read"
        )
    return not forced and (weights_only is False or (weights_only is None and freed))


def _check_mapping(file: VerifiedFile) -> None:
    if is_legacy(file):
        raise UnsupportedStateError(f"{file.name} is in torch's old format, which cannot be mapped: give mmap=False")
    if not file.map_path:
        raise ConfigError(f"{file.name} lies in a store and cannot be mapped: load it without mmap=True")
    if config.load.mmap_flags not in (None, MAP_PRIVATE):
        raise ConfigError(
            "torch.serialization.set_default_mmap_options(MAP_SHARED) would write changes of the tensors into the "
            "committed checkpoint: load with MAP_PRIVATE, or with mmap=False"
        )


def _refuse_crafted(file: VerifiedFile, map_location: Any, weights_only: bool | None) -> None:
    """Raises CorruptCheckpointError or UnsupportedStateError for what torch itself must not be given."""
    if is_legacy(file):
        if not runs_code(weights_only):
            refuse_legacy_beyond_limits(file)
        return
    records = torch_records(file)
    order = byte_order(file, records)
    if order is None:
        # A file that does not say so is what the user has told torch, or else little-endian.
        order = (torch.serialization.get_default_load_endianness() or LoadEndianness.LITTLE).name.lower().encode()
    if order not in (b"native", sys.byteorder.encode()) and place_for(map_location) is None:
        # torch would exchange the bytes of what has no memory, and end the process.
        what = "is of another byte order: map_location must be None or a device with memory"
        raise UnsupportedStateError(f"{file.name} {what}")
    if not runs_code(weights_only):
        refuse_beyond_limits(file, records)


def _refused_in(file: VerifiedFile) -> str:
    """Every type that `weights_only` refuses, with key paths; empty where there is none, or it cannot be told."""
    try:
        record = torch_records(file)["data.pkl"]
        pickled = file.read(record.offset, record.num_bytes)
        return refused_in(pickled, torch.serialization.get_unsafe_globals_in_checkpoint)
    except (*_FILE_ERRORS, pickle.UnpicklingError):
        # A file that is not laid out as torch does it: what torch has said must do.
        return ""


def _translation(file: VerifiedFile, error: Exception, runs_code: bool, map_location: Any) -> CheckpointError | None:
    """What torch has said about the file, as ours, also about a device that the file alone names; None for what trusted
    code has raised, for other devices and for memory."""
    if isinstance(error, pickle.UnpicklingError):
        needed = _refused_in(file)
        what = f"it needs {needed}" if needed else escaped(str(error).strip().splitlines()[0][:_MAX_SAID])
        return UnsupportedStateError(
            f"{file.name} cannot be read with weights_only=True: {what}. Allow the types with "
            "torch.serialization.add_safe_globals, or pass weights_only=False, which runs code from the file: "
            "only for files you trust"
        )
    if shortage := re.search(_OF_THE_SYSTEM, str(error)):
        code = int(shortage[1] or shortage[2])
        return ReadError(OSError(code, os.strerror(code)), path=file.name)
    if isinstance(error, OSError):
        return None if runs_code else ReadError(error, path=file.name)
    # Where the file's code does not run, and it is not about the machine, it is about the file.
    # (The lines after the first are torch's own stack.)
    said = str(error).partition("\n")[0][:_MAX_SAID]
    is_memory, is_device = (bool(re.search(about, said)) for about in (_ABOUT_MEMORY, _ABOUT_DEVICES))
    if is_device and not is_memory and not runs_code and map_location is None and not re.search(_NO_DEVICE, said):
        return UnsupportedStateError(
            f"{file.name} was saved from a device that is not here: {escaped(said)}. Give map_location ('cpu')"
        )
    # What the caller has named as a device was found to be one before; a mapping's values were not looked at.
    is_device = is_device and (isinstance(map_location, dict) or not re.search(_NO_DEVICE, said))
    is_foreign = runs_code or is_memory or is_device
    if not isinstance(error, _FILE_ERRORS) or (is_foreign and not re.search(_ABOUT_FILES, str(error))):
        return None
    return CorruptCheckpointError(
        f"{file.name} is no readable torch file: {type(error).__name__}: {escaped(said)}", path=file.name
    )


class TorchFile(io.RawIOBase):
    """The file object that torch reads: verified bytes, large reads straight from the disk in parallel, a few extents
    held for small ones. One thread at a time."""

    def __init__(self, file: VerifiedFile) -> None:
        super().__init__()
        self._verified = file
        self._position = 0
        self.failure: BaseException | None = None
        """The first error of a read: torch's reader swallows it and complains about a missing attribute instead."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._verified.size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        try:
            return self._readinto(buffer)
        except BaseException as error:
            if self.failure is None:
                self.failure = error
            raise

    def _readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        first = self._position
        end = min(first + len(target), self._verified.size_bytes)
        if end <= first:
            return 0
        extents = self._verified.extents_of(first, end - first)
        # Another read begins or ends in these two.
        for extent in {extents[0], extents[-1]}:
            low, high = self._verified.extent_range(extent)
            low, high = max(low, first), min(high, end)
            target[low - first : high - first] = self._verified.view(low, high - low)
        if len(extents) > 2:
            address = address_of(target) - first
            self._verified.stream(
                lambda offset, view: move(address + offset, address_of(view), len(view)), extents[1:-1]
            )
        kept = self._verified.kept()
        self._verified.drop(kept[: max(0, len(kept) - _HELD_EXTENTS)])
        self._position = end
        return end - first
