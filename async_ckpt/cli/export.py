"""`async-ckpt export`: a verified copy of one file, as a plain `.pt` or `.safetensors` outside any checkpoint."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from ..errors import ConfigError, UnsupportedStateError, escaped
from ..format.safetensors import DTYPE_NAMES
from ..format.tensors import TensorExtent
from ..observers.units import format_bytes
from ..reading.records import FileHeader, read_header
from ..reading.verified_file import VerifiedFile
from ..storage.filesystem import FileSystem
from ..storage.private_dirs import replacing
from .common import EXIT_OK, Located, place_of

_FREE_BYTES, _MAX_GROWTH = 1 << 30, 64
_FORMATS = {".pt": "torch", ".pth": "torch", ".bin": "torch", ".safetensors": "safetensors"}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="ROOT/TAG/FILE",
        help="the file in a checkpoint; its name may be left out where it is the only one",
    )
    parser.add_argument("target", metavar="FILE", help=f"the new file: {', '.join(_FORMATS)}")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    parser.add_argument("--tensors-only", action="store_true", help="for .safetensors: leave out what is no tensor")


def command(source: str, target: str, overwrite: bool, tensors_only: bool) -> int:
    """Write a file of a checkpoint as a plain file. Every byte is verified first, and the new file appears whole or not
    at all.

    Nested keys are joined with dots for .safetensors; what is no tensor is refused there, or left out with
    --tensors-only. Runs no code of the file: tensors inside objects of any class are exported too, under their
    attributes' names.
    """
    place = place_of(source)
    wanted = _FORMATS.get(os.path.splitext(target)[1].lower())
    if wanted is None:
        raise ConfigError(f"{escaped(target)!r} must end in {', '.join(_FORMATS)}")
    manifest = place.catalog.manifest(place.tag)
    files = [entry.path for entry in manifest.files] if place.file is None else [place.file]
    if len(files) != 1:
        raise ConfigError(f"name one file of checkpoint {place.tag!r}: {', '.join(files)}")
    if os.path.lexists(target) and not overwrite:
        raise ConfigError(f"{escaped(target)!r} exists; --overwrite replaces it")
    (file,), entry = files, manifest.file(files[0])
    with _new_file(target) as fresh:
        if entry is not None and entry.format == wanted:
            _copy(place, file, fresh)
        else:
            _convert(place, file, wanted, fresh, tensors_only)
    print(escaped(f"{target}: {format_bytes(os.path.getsize(target))}, verified copy of {place.name}"))
    return EXIT_OK


@contextlib.contextmanager
def _new_file(target: str) -> Iterator[str]:
    """A temporary path beside `target` that takes its place, synced, when the block ends well."""
    filesystem, path = FileSystem(), os.path.abspath(target)
    folder = os.path.dirname(path)
    handle, fresh = tempfile.mkstemp(dir=folder, prefix=".export-")
    os.close(handle)
    with replacing(filesystem, path, fresh):
        yield fresh
        with contextlib.closing(filesystem.open_read(folder, [os.path.basename(fresh)])) as file:
            file.sync()
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(fresh, 0o666 & ~mask)


def _copy(place: Located, file: str, fresh: str) -> None:
    """The committed bytes as they are: the file is a plain one already. No torch."""
    with place.catalog.open_file(place.tag, file) as opened, open(fresh, "r+b", buffering=0) as target:

        def write(offset: int, memory: memoryview) -> None:
            while memory:
                done = os.pwrite(target.fileno(), memory, offset)
                offset, memory = offset + done, memory[done:]

        opened.stream(write)


def _convert(place: Located, file: str, wanted: str, fresh: str, tensors_only: bool) -> None:
    import torch

    if wanted == "torch":
        from ..reading.load import load_committed

        state = load_committed(place.catalog, place.tag, file, map_location="cpu")
        # Not by its path: torch makes the archive's name of that, and refuses one that starts with a dot.
        with open(fresh, "wb") as target:
            torch.save(state, target)
        return
    from safetensors.torch import save_file

    # The file is taken apart by its header: nothing of its pickle is run, so every file can be exported.
    with place.catalog.open_file(place.tag, file) as source:
        source.verify_rest()
        header = read_header(source)
        _check_exportable(header, place, tensors_only)
        whole_bytes = sum(tensor.num_bytes for tensor in header.tensors)
        if whole_bytes > max(_FREE_BYTES, _MAX_GROWTH * source.size_bytes):
            raise UnsupportedStateError(
                f"{place.name} has {source.size_bytes} bytes, and its tensors would have {whole_bytes} in a "
                ".safetensors file, where each is whole (they are expanded, or share memory); nothing was written"
            )
        tensors = {tensor.name: _tensor(torch, source, tensor, place) for tensor in header.tensors}
    save_file(tensors, fresh, metadata={"format": "pt"})


def _check_exportable(header: FileHeader, place: Located, tensors_only: bool) -> None:
    seen: set[str] = set()
    for tensor in header.tensors:
        if tensor.name in seen:
            raise UnsupportedStateError(
                f"two tensors would be called {escaped(tensor.name)!r} in a .safetensors file; nothing was written"
            )
        seen.add(tensor.name)
        if tensor.dtype not in DTYPE_NAMES:
            kind = f" of a {tensor.kind}" if tensor.kind else ""
            raise UnsupportedStateError(
                f"{place.name}: {escaped(tensor.name)!r} is {tensor.dtype}{kind}, which a .safetensors file cannot "
                "hold; nothing was written. Export it to .pt"
            )
    if header.num_others and not tensors_only:
        names = [f"{'.'.join(other.path)} {other.text}" for other in header.others[:5]]
        shown = escaped(", ".join(names)) + (f" and {header.num_others - 5} more" if header.num_others > 5 else "")
        raise UnsupportedStateError(
            f"{place.name} holds values that are no tensors: {shown}; --tensors-only leaves them out"
        )
    if not header.tensors:
        raise UnsupportedStateError(f"{place.name} holds no tensors; nothing was written")


def _tensor(torch: Any, source: VerifiedFile, tensor: TensorExtent, place: Located) -> Any:
    dtype = getattr(torch, tensor.dtype, None)
    if dtype is None:
        raise UnsupportedStateError(
            f"{place.name}: this torch does not know the dtype {tensor.dtype} of {escaped(tensor.name)!r}"
        )
    if not tensor.extent_bytes:
        return torch.empty(tensor.shape, dtype=dtype, device="cpu")
    memory = bytearray(source.view(tensor.offset, tensor.extent_bytes))
    source.drop(source.kept())
    # Tied and strided tensors become whole ones of their own: the format knows no sharing.
    found = torch.frombuffer(memory, dtype=dtype).as_strided(tensor.shape, tensor.stride)
    found = torch._neg_view(found) if tensor.is_neg else found
    return (found.conj() if tensor.is_conj else found).resolve_conj().resolve_neg().contiguous().clone()
