"""Reads committed files back: `load` makes new tensors, `load_into` fills existing ones.

Guarantees:
- With `verify="full"` nothing is returned, and no existing tensor is touched, before every byte of the file was
  compared with the manifest; unpicklers are fed verified bytes only.
- Nothing is opened outside the checkpoint, and no link is followed.
- Pickles run no code unless `weights_only=False` asks for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils.serialization import config

from ..errors import CheckpointError, CheckpointNotFoundError, ConfigError, UnsupportedStateError, report
from ..host.device import without_default_device
from ..host.facts import mount_type
from ..storage.filesystem import read_side_of
from .build import NotPlainError, TensorBuilder, place_for, read_structure
from .by_torch import is_legacy, load_by_torch, runs_code
from .catalog import Catalog
from .committed import find_checkpoint
from .errors import ReadError
from .load_into import Atomic, Restored, match
from .records import naming
from .scatter import stream_into
from .verified_file import MemorySource, VerifiedFile

__all__ = ["Restored", "load", "load_committed", "load_committed_into", "load_into"]

_OVER_A_NETWORK = ("nfs", "cifs", "smb", "ceph", "lustre", "gpfs", "beegfs", "gluster", "afs", "9p", "wekafs", "fuse.")
"""How the types of file systems begin where each page of a mapping is a request, and a lost server ends the process."""


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
        weights_only: False runs the pickle's code: only for files you trust. None is True, unless
            TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set.
        verify: "full" compares every byte's CRC with the manifest, "size" and "off" only sizes.
        mmap: map the file instead of reading it (after verifying it); on a network file system it is read in ranges
            all the same. None is ``torch.utils.serialization.config.load.mmap``.
        num_threads: reads in flight; None chooses.

    Raises:
        CheckpointNotFoundError: not in a committed checkpoint. CorruptCheckpointError: damaged; names file and record.
        UnsupportedStateError: the file needs `weights_only=False`. ReadError: the disk failed.
    """
    how: Any = {"map_location": map_location, "weights_only": weights_only, "mmap": mmap}
    return load_committed(*_locate(path), verify=verify, num_threads=num_threads, **how)


def load_into(
    state_dict: Any,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    verify: str = "full",
    atomic: Atomic = "auto",
    weights_only: bool | None = None,
    num_threads: int | None = None,
    select: str | None = None,
    rename: Mapping[str, str] | None = None,
) -> Restored:
    """Fill the tensors of `state_dict` (nested dicts, lists and tuples) from ``<root>/<tag>/file.pt``. Blocks; any
    thread.

    Names, shapes and dtypes are compared before the first byte moves, and, where given tensors share memory, whether
    the file has the same bytes for it. Tensors are written in place, other leaves are
    in `Restored.state`: the file's structure with your tensors in it.

    Args:
        strict: False loads what matches and reports the rest in `Restored.mismatches`.
        atomic: True: after an error the tensors hold what they held before. Their old bytes (for a GPU: the file's) are
            kept in memory for that, and where it is too little, ConfigError says so before anything is changed. "auto":
            the same up to half of the memory available; of a larger file, the rest is verified before it is
            overwritten, and read twice: an error of the second reading leaves the tensors partly overwritten, and says
            so. False takes no memory, and after an error the tensors are partly overwritten.
        select: only tensors whose dotted names begin like this ("model."); nothing else is read. `state_dict` is the
            whole state, or the selected part (its names without `select`). `Restored.state` is then a flat dict by the
            file's dotted names.
        rename: dotted names in the file (with `select` also without it) to those in `state_dict`: whole names, or what
            they begin with: ``{"module.": ""}``, ``{"encoder": "backbone"}``, ``{"": "model."}``. The longest fitting
            one counts, once. What fits nothing, and two tensors for one name, are errors with `strict=False` too.

    `Restored.read_bytes` shows what was read.

    Raises:
        StateMismatchError: lists every mismatch. Otherwise as `load`.
    """
    options: dict[str, Any] = {"strict": strict, "atomic": atomic, "weights_only": weights_only}
    options |= {"select": select, "rename": rename}
    return load_committed_into(*_locate(path), state_dict, verify=verify, num_threads=num_threads, **options)


def _locate(path: str | os.PathLike[str]) -> tuple[Catalog, str, str]:
    filesystem = read_side_of(os.fspath(path))
    try:
        found = find_checkpoint(path, filesystem)
    except CheckpointError:
        raise
    except OSError as error:
        raise ReadError(error, path=os.fspath(path)) from error
    if found is None or not found[2]:
        is_file = filesystem.stat(os.fspath(path)).kind == "file"
        there = "torch.load reads it if it is a plain torch file" if is_file else "there is no such file"
        raise CheckpointNotFoundError(
            f"{os.fspath(path)} is not in a committed checkpoint (no manifest above it); {there}"
        )
    root, tag, name = found
    return Catalog(root, filesystem), tag, name


def load_committed(
    catalog: Catalog, tag: str, name: str, *, verify: str = "full", num_threads: int | None = None, **options: Any
) -> Any:
    """`load` of file `name` in checkpoint `tag` of `catalog`; for the `options` see `load_opened`."""
    with (
        catalog.naming_older_ones(tag),
        catalog.open_file(tag, name, verify=verify, num_threads=num_threads) as file,
    ):
        return load_opened(file, **options)


def load_opened(
    file: VerifiedFile, *, map_location: Any = None, weights_only: bool | None = None, mmap: bool | None = None
) -> Any:
    """The object in a file that is open already; None is what ``torch.load`` does by itself."""
    _refuse_contexts()
    place = place_for(map_location)
    is_mapped = config.load.mmap if mmap is None else mmap
    if is_mapped and file.map_path and mount_type(file.map_path).startswith(_OVER_A_NETWORK):
        report(logging.INFO, "%s is on a network file system: it is read, and not mapped", file.name)
        is_mapped = False
    with naming(file), without_default_device():
        if file.entry.format == "safetensors":
            if place is None:
                raise UnsupportedStateError(
                    "a safetensors file has no location tags: map_location must be None, a device or its name"
                )
        elif place is None or is_mapped or is_legacy(file) or torch._guards.detect_fake_mode(None) is not None:
            return load_by_torch(file, map_location, weights_only, mmap=is_mapped)
        builder = TensorBuilder(place)
        try:
            state = read_structure(file, builder.tensor)
        except NotPlainError:
            # A valid file may hold more than plain tensors: torch knows how to read it.
            return load_by_torch(file, map_location, weights_only)
        builder.scatter.freeze()
        stream_into(file, builder.scatter)
        return state


def _refuse_contexts() -> None:
    """Refuse switches of torch that would make it skip the reading, or that contradict each other."""
    runs_code(None)
    if getattr(torch.serialization._serialization_tls, "skip_data", False):
        raise ConfigError("torch.serialization.skip_data leaves tensors without their data: load outside of it")


def load_committed_into(
    catalog: Catalog,
    tag: str,
    name: str,
    state_dict: Any,
    *,
    verify: str = "full",
    atomic: Atomic = "auto",
    weights_only: bool | None = None,
    num_threads: int | None = None,
    lend: MemorySource | None = None,
    rename: Mapping[str, str] | None = None,
    **options: Any,
) -> Restored:
    """`load_into` of file `name` in checkpoint `tag` of `catalog`; for the `options` see `match`. What `atomic` sets
    aside goes into memory that `lend` gives, warm from an idle staging arena, one extent at a time."""
    if not isinstance(atomic, bool) and atomic != "auto":
        raise ConfigError(f"atomic must be True, False or 'auto', not {atomic!r}")
    is_names = isinstance(rename, Mapping) and all(isinstance(name, str) for pair in rename.items() for name in pair)
    if rename is not None and not is_names:
        raise ConfigError(f"rename must map names in the file to names in the given state, not {rename!r}")
    _refuse_contexts()
    with (
        catalog.naming_older_ones(tag),
        catalog.open_file(tag, name, verify=verify, num_threads=num_threads, lend=lend) as file,
        naming(file),
        without_default_device(),
    ):
        structure: Any = None
        with contextlib.suppress(NotPlainError):
            if file.entry.format == "safetensors" or not is_legacy(file):
                structure = read_structure(file)
        if structure is None:
            structure = load_by_torch(file, "cpu", weights_only)
        mover, restored = match(file, structure, state_dict, rename=rename, **options)
        mover.run(file, atomic)
        return replace(restored, read_bytes=file.read_bytes, tag=tag)
