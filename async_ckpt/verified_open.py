"""Opens one committed file together with the manifest it was committed under.

Guarantees:
- Manifest and file come from the same directory, also while another process replaces the tag.
- Tag and path are checked, then looked up in the manifest; nothing else is opened, and no link is followed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from . import manifest
from .errors import CheckpointError, CheckpointNotFoundError, ConfigError, CorruptCheckpointError
from .reading import DEFAULT_NUM_THREADS, ReadError, VerifiedFile, aligned_memory

if TYPE_CHECKING:
    from .catalog import Catalog
    from .filesystem import FileSystem, ReadableFile

Verify = Literal["full", "size", "off"]
_MAX_REPLACEMENTS = 8


class Opened:
    """A `VerifiedFile`, its manifest entry and its path. A context manager that closes the file."""

    def __init__(self, file: VerifiedFile, entry: manifest.FileEntry, path: str) -> None:
        self.file = file
        self.entry = entry
        self.path = path

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()


def open_committed(
    catalog: Catalog,
    tag: str,
    name: str,
    *,
    verify: str,
    num_threads: int | None,
    new_buffer: Callable[[int], memoryview] = aligned_memory,
) -> Opened:
    """Open file `name` of a committed tag. Any thread; blocks for the manifest.

    Raises:
        CheckpointNotFoundError: no such tag or file; says what there is. CorruptCheckpointError: manifest or size is wrong.
        ConfigError: unknown `verify`. UnsafePathError: malformed tag or name. ReadError: the disk failed.
    """
    if verify not in ("full", "size", "off"):
        raise ConfigError(f"verify must be 'full', 'size' or 'off', not {verify!r}")
    if num_threads is not None and (isinstance(num_threads, bool) or not isinstance(num_threads, int) or not 1 <= num_threads <= 256):
        raise ConfigError(f"num_threads must be an integer from 1 to 256, not {num_threads!r}")
    parts = manifest.check_relative_path(name)
    manifest.check_tag(tag)
    for _ in range(_MAX_REPLACEMENTS):
        try:
            opened = _try_open(catalog, tag, parts, verify == "full", num_threads or DEFAULT_NUM_THREADS, new_buffer)
        except CheckpointError:
            raise
        except OSError as error:
            where = "/".join((os.fspath(catalog.root), tag, *parts))
            raise ReadError(error.errno, f"cannot open {where}: {error.strerror or error}; it was not changed") from error
        if opened is not None:
            return opened
    raise CheckpointNotFoundError(f"checkpoint {tag!r} in {catalog.root} was replaced {_MAX_REPLACEMENTS} times while it was opened")


def _try_open(
    catalog: Catalog, tag: str, parts: tuple[str, ...], check: bool, num_threads: int, new_buffer: Callable[[int], memoryview]
) -> Opened | None:
    """None when the tag was replaced or removed in between: look again."""
    root, name = os.fspath(catalog.root), "/".join(parts)
    try:
        directory = catalog.filesystem.open_dir(root, (tag,))
    except FileNotFoundError as error:
        held = ", ".join(catalog.tags()) or "none"
        raise CheckpointNotFoundError(f"no committed checkpoint {tag!r} in {root}; committed are: {held}") from error
    with contextlib.closing(directory):
        try:
            raw = directory.read_file((manifest.MANIFEST_NAME,), manifest.MAX_MANIFEST_BYTES)
            entry = _entry(manifest.decode(raw, source=directory.path), tag, name)
            file = directory.open_read(parts, direct=True)
        except CheckpointNotFoundError:
            raise
        except FileNotFoundError as error:
            if catalog.filesystem.stat(directory.path).identity != directory.identity:
                return None
            message = f"{directory.path} lacks {os.path.basename(str(error.filename))!r}: damaged, or not committed by this package"
            raise CorruptCheckpointError(message, path=str(error.filename)) from error
    return _verified(file, entry, check, num_threads, new_buffer)


def _verified(
    file: ReadableFile, entry: manifest.FileEntry, check: bool, num_threads: int, new_buffer: Callable[[int], memoryview]
) -> Opened:
    try:
        if file.size_bytes != entry.size_bytes:
            message = f"{file.path} has {file.size_bytes} bytes, committed were {entry.size_bytes}; nothing was loaded"
            raise CorruptCheckpointError(message, path=file.path)
        verified = VerifiedFile(
            file,
            name=file.path,
            extent_bytes=entry.extent_bytes,
            extent_crc32=entry.extent_crc32,
            check=check,
            num_threads=num_threads,
            new_buffer=new_buffer,
        )
    except BaseException:
        file.close()
        raise
    return Opened(verified, entry, file.path)


def _entry(found: manifest.Manifest, tag: str, name: str) -> manifest.FileEntry:
    if found.tag != tag:
        raise CorruptCheckpointError(f"the manifest of checkpoint {tag!r} says it is {found.tag!r}: the directory was renamed or swapped")
    for entry in found.files:
        if entry.path == name:
            return entry
    held = ", ".join(entry.path for entry in found.files) or "none"
    raise CheckpointNotFoundError(f"checkpoint {tag!r} holds no file {name!r}; its files are: {held}")


def split_path(path: str | os.PathLike[str], filesystem: FileSystem) -> tuple[str, str, str]:
    """(root, tag, name) of a file in a committed checkpoint, from the manifest nearest above it. Blocks for lstat calls.

    Raises:
        CheckpointNotFoundError: no directory above holds a manifest.
    """
    given = os.path.abspath(os.fspath(path))
    folder, parts = os.path.split(given)
    name = parts
    while True:
        above, tag = os.path.split(folder)
        if not tag:
            break
        if filesystem.stat(os.path.join(folder, manifest.MANIFEST_NAME)).kind == "file":
            return above, tag, name
        folder, name = above, f"{tag}/{name}"
    there = "torch.load reads it if it is a plain torch file" if filesystem.stat(given).kind == "file" else "there is no such file"
    raise CheckpointNotFoundError(f"{given} is not in a committed checkpoint (no manifest above it); {there}")
