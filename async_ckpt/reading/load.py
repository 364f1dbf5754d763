"""Reads committed files back: `load` makes new tensors, `load_into` fills existing ones.

Guarantees:
- With `verify="full"` nothing is returned, and no existing tensor is touched, before every byte of the file was
  compared with the manifest; unpicklers are fed verified bytes only.
- Nothing is file outside the checkpoint, and no link is followed.
- Pickles run no code unless `weights_only=False` asks for it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from mmap import MAP_PRIVATE
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.serialization import config

from ..errors import CheckpointError, ConfigError, CorruptCheckpointError, UnsupportedStateError
from ..format.plain import NotPlainError, load_plain
from ..format.zip_directory import HeaderCheck, Record, UnusualLayoutError, read_directory
from ..host.device import without_default_device
from .build import TensorBuilder, place_for
from .damage import naming_the_record
from .errors import ReadError
from .extents import MemorySource, VerifiedFile
from .limits import LEGACY_MAGIC, refuse_bombs, refuse_legacy_bombs, torch_records
from .load_into import Atomic, Restored, fill, read_inventory, safetensors_inventory
from .safetensors_file import load_safetensors
from .scatter import stream_into
from .torch_file import TorchFile
from .verified_file import open_committed, split_path

if TYPE_CHECKING:
    from .catalog import Catalog

_FILE_ERRORS = (RuntimeError, EOFError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError, struct.error)
_ABOUT_FILES = "PytorchStreamReader|archive|unpickling|pickle"
_OF_THE_SYSTEM = r"errno (\d+) on fopen|unable to (?:open|mmap|stat).*\((\d+)\)"
"""What torch says of a failed system call."""
_ABOUT_MACHINES = r"(?i)map_location|device|cuda|backend|alloc|memory"

__all__ = ["Restored", "load", "load_committed", "load_committed_into", "load_into"]


def load(
    path: str | os.PathLike[str],
    *,
    map_location: Any = None,
    weights_only: bool | None = None,
    verify: str = "full",
    mmap: bool | None = None,
    num_threads: int | None = None,
) -> Any:
    """The object saved at ``<root>/<tag>/file.pt``, as `torch.load` would return it, verified. Blocks; any thread.

    Args:
        map_location: as in `torch.load`.
        weights_only: False runs the pickle's code: only for files you trust. None is True, unless TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set.
        verify: "full" compares every byte's CRC with the manifest, "size" and "off" only sizes.
        mmap: map the file instead of reading it (after verifying it). None is ``torch.utils.serialization.config.load.mmap``.
        num_threads: reads in flight; None chooses.

    Raises:
        CheckpointNotFoundError: not in a committed checkpoint. CorruptCheckpointError: damaged; names file and record.
        UnsupportedStateError: the file needs `weights_only=False`. ReadError: the disk failed.
    """
    catalog, tag, name = _locate(path)
    return load_committed(
        catalog, tag, name, map_location=map_location, weights_only=weights_only, verify=verify, mmap=mmap, num_threads=num_threads
    )


def load_into(
    state_dict: Any,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    verify: str = "full",
    atomic: Atomic = "auto",
    weights_only: bool | None = None,
    num_threads: int | None = None,
) -> Restored:
    """Fill the tensors of `state_dict` (nested dicts, lists and tuples) from ``<root>/<tag>/file.pt``. Blocks; any thread.

    Names, shapes and dtypes are compared before the first byte moves, and, where given tensors share memory, whether the file
    has the same bytes for it. Tensors are written in place, other leaves are
    in `Restored.state`: the file's structure with your tensors in it.

    Args:
        strict: False loads what matches and reports the rest in `Restored.mismatches`.
        atomic: True: after an error the tensors hold what they held before. Their old bytes (for a GPU: the file's) are kept in
            memory for that, and where it is too little, ConfigError says so before anything is changed. "auto": the same up to
            half of the memory available; of a larger file, the rest is verified before it is overwritten, and read twice: an
            error of the second reading leaves the tensors partly overwritten, and says so. False takes no memory, and after an
            error the tensors are partly overwritten.

    Raises:
        StateMismatchError: lists every mismatch. Otherwise as `load`.
    """
    catalog, tag, name = _locate(path)
    return load_committed_into(
        catalog, tag, name, state_dict, strict=strict, verify=verify, atomic=atomic, weights_only=weights_only, num_threads=num_threads
    )


def _locate(path: str | os.PathLike[str]) -> tuple[Catalog, str, str]:
    from ..storage.local_filesystem import read_side_of
    from .catalog import Catalog

    root, tag, name = split_path(path, read_side_of(os.fspath(path)))
    return Catalog(root), tag, name


def load_committed(
    catalog: Catalog,
    tag: str,
    name: str,
    *,
    map_location: Any = None,
    weights_only: bool | None = None,
    verify: str = "full",
    mmap: bool | None = None,
    num_threads: int | None = None,
) -> Any:
    """`load` of file `name` in checkpoint `tag` of `catalog`."""
    with open_committed(catalog, tag, name, verify=verify, num_threads=num_threads) as file:
        return load_opened(file, map_location=map_location, weights_only=weights_only, mmap=mmap)


def load_opened(file: VerifiedFile, *, map_location: Any = None, weights_only: bool | None = None, mmap: bool | None = None) -> Any:
    """The object in a file that is open already; None is what ``torch.load`` does by itself."""
    _refuse_contexts()
    with naming_the_record(file), without_default_device():
        if file.entry.format == "safetensors":
            return load_safetensors(file, map_location)
        is_legacy = _is_legacy(file)
        if config.load.mmap if mmap is None else mmap:
            return _load_mapped(file, map_location, weights_only, is_legacy)
        if is_legacy:
            return _load_with_torch(file, map_location, weights_only, is_legacy=True)
        try:
            return _load_plain(file, map_location)
        except (NotPlainError, UnusualLayoutError):
            # A valid file may hold more than plain tensors: torch knows how to read it.
            return _load_with_torch(file, map_location, weights_only)


def _is_legacy(file: VerifiedFile) -> bool:
    """Whether it is in torch's old format.

    Raises:
        UnsupportedStateError: nobody says that it is a torch file, and it does not look like one.
    """
    head = file.read(0, min(len(LEGACY_MAGIC), file.size_bytes))
    if file.entry.format == "opaque" and head != LEGACY_MAGIC and not head.startswith(b"PK"):
        raise UnsupportedStateError(f"{file.name} was saved as bytes and is no state that could be loaded; read it at its path")
    return head == LEGACY_MAGIC


def _refuse_contexts() -> None:
    """Refuse what would make torch skip the reading."""
    if getattr(torch.serialization._serialization_tls, "skip_data", False):
        raise ConfigError("torch.serialization.skip_data leaves tensors without their data: load outside of it")


def _runs_code(weights_only: bool | None) -> bool:
    """Whether torch, told this, runs the pickle's code: its environment variables have their say."""

    def is_set(name: str) -> bool:
        return os.environ.get(name, "0").lower() in ("1", "y", "yes", "true")

    if is_set("TORCH_FORCE_WEIGHTS_ONLY_LOAD"):
        return False
    return weights_only is False or (weights_only is None and is_set("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"))


def load_committed_into(
    catalog: Catalog,
    tag: str,
    name: str,
    state_dict: Any,
    *,
    strict: bool = True,
    verify: str = "full",
    atomic: Atomic = "auto",
    weights_only: bool | None = None,
    num_threads: int | None = None,
    lend: MemorySource | None = None,
) -> Restored:
    """`load_into` of file `name` in checkpoint `tag` of `catalog`.

    `lend`: warm memory for what `atomic` sets aside (an idle staging arena's), one extent at a time.
    """
    if atomic not in (True, False, "auto"):
        raise ConfigError(f"atomic must be True, False or 'auto', not {atomic!r}")
    _refuse_contexts()
    with (
        open_committed(catalog, tag, name, verify=verify, num_threads=num_threads, lend=lend) as file,
        naming_the_record(file),
        without_default_device(),
    ):
        structure = _structure(file, weights_only)
        return fill(file, structure, state_dict, strict=strict, atomic=atomic)


def _structure(file: VerifiedFile, weights_only: bool | None) -> Any:
    """The file's structure, its tensors still on disk where they can be read one by one."""
    if file.entry.format == "safetensors":
        return safetensors_inventory(file)
    if _is_legacy(file):
        return _load_with_torch(file, "cpu", weights_only, is_legacy=True)
    try:
        return read_inventory(file, _plain_records(file))
    except (NotPlainError, UnusualLayoutError):
        return _load_with_torch(file, "cpu", weights_only)


def _plain_records(file: VerifiedFile) -> dict[str, Record]:
    """The records of a file in this machine's byte order, whose local headers are compared as it is read."""
    records = read_directory(file.read, file.size_bytes)
    if _byte_order(file, records) != sys.byteorder.encode():
        raise UnusualLayoutError("not this machine's byte order")
    file.on_bytes = HeaderCheck(records)
    return records


def _byte_order(file: VerifiedFile, records: Mapping[str, Record]) -> bytes | None:
    order = records.get("byteorder")
    return None if order is None else file.read(order.offset, min(order.num_bytes, 16))


def _load_plain(file: VerifiedFile, map_location: Any) -> Any:
    place = place_for(map_location)
    if place is None or torch._guards.detect_fake_mode(None) is not None:
        raise NotPlainError("map_location is a callable or a mapping, or tensors are fakes")
    records = _plain_records(file)
    pickled = records.get("data.pkl")
    if pickled is None:
        raise UnusualLayoutError("no data.pkl")
    builder = TensorBuilder(records, place, name=file.name)
    state = load_plain(file.view(pickled.offset, pickled.num_bytes), builder)
    builder.scatter.freeze()
    stream_into(file, builder.scatter)
    return state


def _refuse_crafted(file: VerifiedFile, map_location: Any, weights_only: bool | None, is_legacy: bool) -> None:
    """Raises CorruptCheckpointError or UnsupportedStateError for what torch itself must not be given."""
    if is_legacy:
        if not _runs_code(weights_only):
            refuse_legacy_bombs(file)
        return
    records = torch_records(file)
    if _byte_order(file, records) not in (None, sys.byteorder.encode()) and place_for(map_location) is None:
        # torch would exchange the bytes of what has no memory, and end the process.
        raise UnsupportedStateError(f"{file.name} is of another byte order: map_location must be None or a device with memory")
    if not _runs_code(weights_only):
        refuse_bombs(file, records)


def _load_with_torch(file: VerifiedFile, map_location: Any, weights_only: bool | None, *, is_legacy: bool = False) -> Any:
    _refuse_crafted(file, map_location, weights_only, is_legacy)
    source = TorchFile(file)
    try:
        with _translated(file, map_location, weights_only):
            state = torch.load(source, map_location=map_location, weights_only=weights_only, mmap=False)  # type: ignore[arg-type]
    except Exception:
        if source.failure is not None:
            raise source.failure from None
        raise
    file.verify_rest()
    return state


def _load_mapped(file: VerifiedFile, map_location: Any, weights_only: bool | None, is_legacy: bool) -> Any:
    if is_legacy:
        raise UnsupportedStateError(f"{file.name} is in torch's old format, which cannot be mapped: give mmap=False")
    if not file.map_path:
        raise ConfigError(f"{file.name} lies in a store and cannot be mapped: load it without mmap=True")
    if config.load.mmap_flags not in (None, MAP_PRIVATE):
        raise ConfigError(
            "torch.serialization.set_default_mmap_options(MAP_SHARED) would write changes of the tensors into the committed checkpoint: "
            "load with MAP_PRIVATE, or with mmap=False"
        )
    file.verify_rest()
    _refuse_crafted(file, map_location, weights_only, is_legacy)
    with _translated(file, map_location, weights_only):
        # Not by its name: the tag may be replaced, and what has that name then was not verified.
        return torch.load(file.map_path, map_location=map_location, weights_only=weights_only, mmap=True)


@contextlib.contextmanager
def _translated(file: VerifiedFile, map_location: Any, weights_only: bool | None) -> Iterator[None]:
    """torch's errors about the file become ours; those about `map_location`, devices, memory and trusted code pass."""
    may_be_foreign = _runs_code(weights_only) or callable(map_location) or isinstance(map_location, Mapping)
    try:
        yield
    except CheckpointError:
        raise
    except OSError as error:
        if may_be_foreign:
            raise
        raise ReadError(error, path=file.name) from error
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it needs {refused.group(1)!r}" if refused else str(error).strip().splitlines()[0]
        message = (
            f"{file.name} cannot be read with weights_only=True: {what}. Allow the type with torch.serialization.add_safe_globals, "
            "or pass weights_only=False, which runs code from the file: only for files you trust"
        )
        raise UnsupportedStateError(message) from error
    except _FILE_ERRORS as error:
        if shortage := re.search(_OF_THE_SYSTEM, str(error)):
            code = int(shortage[1] or shortage[2])
            raise ReadError(OSError(code, os.strerror(code)), path=file.name) from error
        # Where neither the caller's code nor the file's runs, and it is not about the machine, it is about the file.
        # (The lines after the first are torch's own stack.)
        said = str(error).partition("\n")[0]
        if not re.search(_ABOUT_FILES, str(error)) and (may_be_foreign or re.search(_ABOUT_MACHINES, said)):
            raise
        raise CorruptCheckpointError(f"{file.name} is no readable torch file: {type(error).__name__}: {said}", path=file.name) from error
