"""Opens one committed file for a verified read, and finds the checkpoint that a plain path lies in.

Guarantees:
- Tag and name are checked and looked up in the manifest of the same directory; nothing else is opened, no link followed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ..errors import CheckpointError, CheckpointNotFoundError, ConfigError
from ..format.names import MANIFEST_NAME, is_url
from .errors import ReadError
from .extents import MemorySource, VerifiedFile

if TYPE_CHECKING:
    from ..storage.filesystem import ReadSide
    from .catalog import Catalog


def open_committed(
    catalog: Catalog,
    tag: str,
    name: str,
    *,
    verify: str,
    num_threads: int | None,
    lend: MemorySource | None = None,
) -> VerifiedFile:
    """Open file `name` of a committed tag. Any thread; blocks for the manifest.

    Raises:
        CheckpointNotFoundError: no such tag or file; says what there is. CorruptCheckpointError: manifest or size is wrong.
        ConfigError: unknown `verify`. UnsafePathError: malformed tag or name. ReadError: the disk failed.
    """
    if verify not in ("full", "size", "off"):
        raise ConfigError(f"verify must be 'full', 'size' or 'off', not {verify!r}")
    if num_threads is not None and (isinstance(num_threads, bool) or not isinstance(num_threads, int) or not 1 <= num_threads <= 256):
        raise ConfigError(f"num_threads must be an integer from 1 to 256, not {num_threads!r}")
    try:
        return catalog.read(
            tag,
            lambda checkpoint: checkpoint.open_file(checkpoint.entry(name), check=verify == "full", num_threads=num_threads, lend=lend),
        )
    except CheckpointError:
        raise
    except OSError as error:
        raise ReadError(error, path=f"{catalog.root}/{tag}/{name}") from error


def split_path(path: str | os.PathLike[str], filesystem: ReadSide) -> tuple[str, str, str]:
    """(root, tag, name) of a file in a committed checkpoint, from the manifest nearest above it. Blocks for lstat calls.

    Raises:
        CheckpointNotFoundError: no directory above holds a manifest. ReadError: the disk failed.
    """
    text = os.fspath(path)
    given = text if is_url(text) else os.path.abspath(text)
    try:
        return _split(given, filesystem)
    except CheckpointError:
        raise
    except OSError as error:
        raise ReadError(error, path=given) from error


def _split(given: str, filesystem: ReadSide) -> tuple[str, str, str]:
    folder, name = os.path.split(given)
    while True:
        above, tag = os.path.split(folder)
        if not tag or above.endswith(":"):
            break
        # A link or FIFO in its place is damage, which whoever opens the checkpoint tells.
        if filesystem.stat(os.path.join(folder, MANIFEST_NAME)).kind != "missing":
            return above, tag, name
        folder, name = above, f"{tag}/{name}"
    there = "torch.load reads it if it is a plain torch file" if filesystem.stat(given).kind == "file" else "there is no such file"
    raise CheckpointNotFoundError(f"{given} is not in a committed checkpoint (no manifest above it); {there}")
