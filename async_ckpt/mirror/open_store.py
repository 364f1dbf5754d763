"""Which store a mirror's URL means. The library of one is imported when it is asked for."""

from __future__ import annotations

from concurrent.futures import Executor

from ..storage.filesystem import FileSystem
from .config import Mirror, split_url
from .store import Store


def open_store(
    mirror: Mirror, filesystem: FileSystem, executor: Executor | None = None, *, quick: bool = False
) -> Store:
    """The store of a mirror; its library is imported now. Does not connect.

    Args:
        executor: where a mirror in `filesystem` writes; None where nothing is written.
        quick: give up within `PROBE_TIMEOUT_S` instead of the mirror's own patience.

    Raises:
        ConfigError: the extra is not installed, or the options are not those of the store.
    """
    scheme, _, prefix = split_url(mirror.url)
    if scheme == "file":
        from .file_store import FileStore

        return FileStore(mirror.url, prefix or "/", filesystem, executor)
    from .object_store import ObjectStore

    return ObjectStore(mirror, quick=quick)
