"""`async-ckpt export`: a verified copy of one file, as a plain `.pt` or `.safetensors` outside any checkpoint."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from ..errors import UnsupportedStateError
from ..units import format_bytes
from .failing import UsageError, clean
from .locating import Place, place_of

_FORMATS = {".pt": "torch", ".pth": "torch", ".bin": "torch", ".safetensors": "safetensors"}


def command(
    source: Annotated[str, typer.Argument(help="The file in a checkpoint.", metavar="ROOT/TAG/FILE", show_default=False)],
    target: Annotated[str, typer.Argument(help="The new file: .pt, .pth, .bin or .safetensors.", metavar="FILE", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
    tensors_only: Annotated[bool, typer.Option("--tensors-only", help="For .safetensors: leave out what is no tensor.")] = False,
) -> None:
    """Write a file of a checkpoint as a plain file. Every byte is verified first, and the new file appears whole or not at all.

    Nested keys are joined with dots for .safetensors; what is no tensor is refused there, or left out with --tensors-only.
    """
    place = place_of(source)
    wanted = _FORMATS.get(os.path.splitext(target)[1].lower())
    if wanted is None:
        raise UsageError(f"{clean(target)!r} must end in {', '.join(_FORMATS)}")
    if place.file is None:
        files = [entry.path for entry in place.catalog.manifest(place.tag).files]
        raise UsageError(f"name one file of checkpoint {place.tag!r}: {', '.join(files)}")
    if os.path.lexists(target) and not overwrite:
        raise UsageError(f"{clean(target)!r} exists; --overwrite replaces it")
    entry = place.catalog.manifest(place.tag).file(place.file)
    with _new_file(target) as fresh:
        if entry is not None and entry.format == wanted:
            _copy(place, place.file, fresh)
        else:
            _convert(place, place.file, wanted, fresh, tensors_only)
    typer.echo(f"{target}: {format_bytes(os.path.getsize(target))}, verified copy of {place.name}")


@contextlib.contextmanager
def _new_file(target: str) -> Iterator[str]:
    """A temporary path beside `target` that takes its place, synced, when the block ends well."""
    folder = os.path.dirname(os.path.abspath(target))
    handle, fresh = tempfile.mkstemp(dir=folder, prefix=".export-")
    os.close(handle)
    try:
        yield fresh
        _sync(fresh)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(fresh, 0o644 & ~mask)
        os.replace(fresh, target)
        _sync(folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(fresh)
        raise


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy(place: Place, file: str, fresh: str) -> None:
    """The committed bytes as they are: the file is a plain one already. No torch."""
    from ..restore.verified_open import open_committed

    with open_committed(place.catalog, place.tag, file, verify="full", num_threads=None) as opened:
        handle = os.open(fresh, os.O_WRONLY)
        try:
            opened.file.stream(lambda offset, memory: _write(handle, offset, memory))
        finally:
            os.close(handle)


def _write(handle: int, offset: int, memory: memoryview) -> None:
    done = 0
    while done < len(memory):
        done += os.pwrite(handle, memory[done:], offset + done)


def _convert(place: Place, file: str, wanted: str, fresh: str, tensors_only: bool) -> None:
    import importlib

    # Through importlib: the command line as such must not depend on torch.
    restore, torch = importlib.import_module("async_ckpt.restore.loading"), importlib.import_module("torch")
    state = restore.load_committed(place.catalog, place.tag, file, map_location="cpu")
    if wanted == "torch":
        torch.save(state, fresh)
        return
    from safetensors.torch import save_file

    tensors: dict[str, Any] = {}
    others: list[str] = []
    for path, leaf in _leaves(state):
        if not isinstance(leaf, torch.Tensor):
            others.append(path)
        elif path in tensors:
            raise UnsupportedStateError(f"two tensors would be called {path!r} in a .safetensors file; nothing was written")
        else:
            # Tied and strided tensors become copies of their own: the format knows no sharing.
            tensors[path] = leaf.detach().contiguous().clone()
    if others and not tensors_only:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise UnsupportedStateError(f"{place.name} holds values that are no tensors: {shown}; --tensors-only leaves them out")
    if not tensors:
        raise UnsupportedStateError(f"{place.name} holds no tensors; nothing was written")
    save_file(tensors, fresh, metadata={"format": "pt"})


def _leaves(state: Any) -> Iterator[tuple[str, Any]]:
    """(key path with dots, leaf), in order; a container inside itself is passed over."""
    todo: list[tuple[Any, tuple[str, ...], frozenset[int]]] = [(state, (), frozenset())]
    while todo:
        value, keys, above = todo.pop()
        if isinstance(value, dict):
            items = list(value.items())
        elif isinstance(value, (list, tuple)):
            items = list(enumerate(value))
        else:
            yield ".".join(keys), value
            continue
        if id(value) not in above:
            todo.extend((child, (*keys, str(key)), above | {id(value)}) for key, child in reversed(items))
