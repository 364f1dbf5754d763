"""What engines have published, read back by `async-ckpt watch`: see `status_places` for where, `status_document` for what."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator

from ..errors import CheckpointError
from ..filesystem import FileSystem, LocalFileSystem
from ..host.process import Owner, OwnerState
from ..names import parse_status_name
from .status_document import MAX_STATUS_BYTES, Status, decode
from .status_places import parse_runtime_name, remove_folder_if_empty, root_key, runtime_homes

logger = logging.getLogger("async_ckpt")

_GONE = (OwnerState.DEAD, OwnerState.REBOOTED)
_FORGOTTEN_S = 7 * 86400.0
"""A file of an owner that cannot be looked up (another container's) is removed at this age; a living owner writes it again."""


def read_statuses(root: str, filesystem: FileSystem | None = None) -> list[Status]:
    """Every readable status of an engine on `root`, of this machine and in the root itself, oldest first. Blocks.

    Damaged and foreign files are left out with a log record; files of dead owners in runtime directories are removed.

    Raises:
        OSError: the root cannot be listed.
    """
    fs = LocalFileSystem() if filesystem is None else filesystem
    found: dict[tuple[Owner, str], Status] = {}
    # What is published on this machine comes last, and wins: it is the newer one.
    for folder, name, owner in [*_shared_files(fs, root), *_runtime_files(fs, root)]:
        try:
            status = decode(fs.read_file(os.path.join(folder, name), MAX_STATUS_BYTES), owner, fs.owner_state(owner))
        except FileNotFoundError:
            continue
        except (OSError, CheckpointError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            logger.warning("%r is left out: %s", name, error)
            continue
        found[owner, name.removesuffix(".json").rpartition(".")[2]] = status
    return sorted(found.values(), key=lambda status: (status.rank, status.updated_unix_s))


def remove_stale(root: str, filesystem: FileSystem | None = None) -> list[str]:
    """Remove the status files in `root` of processes that are certainly gone; returns their names. Blocks.

    Raises:
        OSError: the root cannot be listed, or a file not removed.
    """
    fs = LocalFileSystem() if filesystem is None else filesystem
    removed = []
    for name in fs.listdir(root):
        owner = parse_status_name(name.removesuffix(".new"))
        if owner is not None and fs.owner_state(owner) in _GONE:
            fs.unlink(os.path.join(root, name))
            removed.append(name)
    return removed


def remove_stale_runtime() -> None:
    """Remove what dead processes of this user have left in runtime directories, for every root. Blocks. Raises OSError."""
    fs = LocalFileSystem()
    for home in runtime_homes(os.geteuid()):
        for key in fs.listdir(home):
            _clean(fs, os.path.join(home, key))


def _shared_files(fs: FileSystem, root: str) -> Iterator[tuple[str, str, Owner]]:
    yield from _named(fs, root, parse_status_name)


def _runtime_files(fs: FileSystem, root: str) -> Iterator[tuple[str, str, Owner]]:
    # The training may belong to the root's owner, and its administrator may look.
    for uid in {os.geteuid(), os.stat(root).st_uid}:
        for home in runtime_homes(uid):
            folder = os.path.join(home, root_key(root))
            try:
                _clean(fs, folder)
                yield from _named(fs, folder, parse_runtime_name)
            except OSError as error:
                if not isinstance(error, (FileNotFoundError, PermissionError)):
                    logger.warning("%r is left out: %s", folder, error)


def _named(fs: FileSystem, folder: str, parse: Callable[[str], Owner | None]) -> Iterator[tuple[str, str, Owner]]:
    for name in sorted(fs.listdir(folder)):
        owner = parse(name)
        if owner is not None:
            yield folder, name, owner


def _clean(fs: FileSystem, folder: str) -> None:
    """Remove what dead owners left in one root's folder of a runtime directory. Others clean up too, and may be quicker."""
    try:
        names = fs.listdir(folder)
    except FileNotFoundError:
        return
    for name in names:
        owner = parse_runtime_name(name.removesuffix(".new"))
        if owner is None:
            continue
        path, state = os.path.join(folder, name), fs.owner_state(owner)
        if state in _GONE or (state is not OwnerState.ALIVE and time.time() - fs.stat(path).mtime_ns / 1e9 > _FORGOTTEN_S):
            try:
                fs.unlink(path)
            except FileNotFoundError:
                continue
    remove_folder_if_empty(folder)
