"""Directories that another tool has saved: given a manifest, so that they are replaced, listed and deleted as a whole.

Guarantees: nothing is ever listed in a manifest that was not read, checksummed and synced.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from ..errors import CheckpointError, UnsafePathError, report
from ..format import manifest
from ..format.checksum import crc32
from ..format.manifest import FileEntry, Manifest
from ..format.names import MANIFEST_NAME, check_relative_path
from ..storage.filesystem import FileSystem
from ..storage.private_dirs import tree_of
from ..storage.write_error import write_error

ADOPTED = "adopted"
"""Metadata of such a manifest."""

_EXTENT_BYTES = 16 << 20


def adopt(filesystem: FileSystem, root: str, tag: str) -> bool:
    """Give the folder of another tool's checkpoint a manifest, so that it can be replaced atomically; True if there was
    one. Its files stay as they are, and stay loadable. Reads and syncs all of them: blocks for as long as that takes.
    Raises UnsafePathError: it holds what a checkpoint cannot. WriteError: it cannot be read, or no manifest written."""
    folder = os.path.join(root, tag)
    if filesystem.stat(folder).kind != "dir" or filesystem.stat(os.path.join(folder, MANIFEST_NAME)).kind != "missing":
        return False
    told = "%s was not written by this package: reading it once, so that it can be replaced as a whole"
    report(logging.WARNING, told, folder)
    what = f"{folder!r} was written by another tool and cannot be replaced as a whole; move or delete it"
    try:
        entries = tuple(read_entries(filesystem, folder))
        # Older than anything that will be committed from now on.
        created_unix_ns = filesystem.stat(folder).mtime_ns
        why = {ADOPTED: "written by another checkpoint engine"}
        adopted = Manifest(tag, created_unix_ns, entries, why, {"package": "async_ckpt"})
        with contextlib.suppress(FileExistsError):
            filesystem.create_file(os.path.join(folder, MANIFEST_NAME), manifest.encode(adopted))
        filesystem.fsync_dir(folder)
    except OSError as error:
        raise write_error(filesystem, error, what, folder) from error
    except CheckpointError as error:
        raise UnsafePathError(f"{what}: {error}") from error
    return True


def read_entries(filesystem: FileSystem, top: str, inner: str = "", rank: int | None = None) -> Iterator[FileEntry]:
    """What is below `<top>/<inner>`, each file read and synced. Blocks."""
    buffer = memoryview(bytearray(_EXTENT_BYTES))
    for name, found in sorted(tree_of(filesystem, os.path.join(top, inner))):
        if found.kind != "dir":
            path, crcs = os.path.join(inner, name), []
            with contextlib.closing(filesystem.open_read(top, check_relative_path(path, stored=True))) as file:
                for offset in range(0, file.size_bytes, _EXTENT_BYTES):
                    part = buffer[: min(_EXTENT_BYTES, file.size_bytes - offset)]
                    file.pread_into(part, offset)
                    crcs.append(crc32(part))
                file.sync()
            yield FileEntry(path, file.size_bytes, _EXTENT_BYTES, tuple(crcs), "opaque", "none", None, rank)
