"""A store as the reading side of a file system, so that catalog, verification and loads are the same code for both.

Opening a tag reads its manifest. Blocks for requests; any thread; nothing is kept between calls.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import TypeVar

from ..errors import CheckpointNotFoundError, CorruptCheckpointError
from ..format.manifest import MAX_MANIFEST_BYTES
from ..format.names import MANIFEST_NAME
from ..host.memory import address_of, move
from ..host.process import Owner, OwnerState
from ..reading.catalog import Catalog
from ..storage.filesystem import FileStat, FileSystem
from ..storage.read_file import Kind
from ..threads.executor import DaemonExecutor
from .config import Mirror, split_url
from .store import ObjectInfo, Store

T = TypeVar("T")
R = TypeVar("R")
_PATIENCE_S = 20.0
_NUM_REQUESTS = 32
"""Small requests in flight at once; their cost is the way there and back."""


def open_store(mirror: Mirror, filesystem: FileSystem, *, quick: bool = False) -> Store:
    """The store of a mirror; its library is imported now. Does not connect. A `quick` one gives up within
    `PROBE_TIMEOUT_S` instead of the mirror's own patience. Raises ConfigError: the extra is not installed, or the
    options are not those of the store."""
    scheme, _, prefix = split_url(mirror.url)
    if scheme == "file":
        from .file_store import FileStore

        return FileStore(mirror.url, prefix or "/", filesystem)
    from .object_store import ObjectStore

    return ObjectStore(mirror, quick=quick)


def remote_catalog(mirror: Mirror, store: Store | None = None) -> Catalog:
    """The checkpoints in a mirror, read through `store` where there is one already; does not connect. Raises
    ConfigError: no such scheme, or the extra is not installed."""
    return Catalog(mirror.url, RemoteFileSystem(mirror, store))


def open_url(url: str) -> RemoteFileSystem:
    """A store for reading, from the root's URL, or from that of anything in it; credentials are the environment's. With
    less patience than an upload has: somebody waits. Raises ConfigError: no such scheme, or the extra is not
    installed."""
    scheme, bucket, _ = split_url(url)
    return RemoteFileSystem(Mirror(f"{scheme}://{bucket}", retry_timeout_s=_PATIENCE_S))


class RemoteFileSystem:
    """What the reading side needs of `filesystem.FileSystem`. Paths begin with the mirror's URL."""

    def __init__(self, mirror: Mirror, store: Store | None = None) -> None:
        self.store = store or open_store(mirror, FileSystem())
        self._root = mirror.url

    def owner_state(self, owner: Owner) -> OwnerState:
        return OwnerState.UNKNOWN

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """`function` of each item, many at once, in their order; the first failure is raised when all have ended."""
        todo = list(items)
        if len(todo) < 2:
            return [function(item) for item in todo]
        pool = DaemonExecutor("async-ckpt-remote", min(_NUM_REQUESTS, len(todo)))
        try:
            futures = [pool.submit(function, item) for item in todo]
            wait(futures)
            return [future.result() for future in futures]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def listdir(self, path: str) -> list[str]:
        return [*self.store.list(self._key(path))[0]]

    def stat(self, path: str) -> FileStat:
        key = self._key(path)
        if not key:
            return FileStat("dir", 0, 0, (0, 0), 0)
        is_file = key.rpartition("/")[2] == MANIFEST_NAME
        info = self.store.head(key if is_file else f"{key}/{MANIFEST_NAME}")
        if info is None:
            return FileStat("missing", 0, 0, (0, 0), 0)
        return FileStat("file" if is_file else "dir", info.size_bytes, 0, _identity(info), 0)

    def open_dir(self, root: str, parts: Sequence[str] = ()) -> RemoteDirectory:
        tag = self._key("/".join((root, *parts)))
        there = self.store.read(f"{tag}/{MANIFEST_NAME}", MAX_MANIFEST_BYTES)
        if there is None:
            raise FileNotFoundError(f"{self._root}/{tag} has no {MANIFEST_NAME}")
        return RemoteDirectory(self.store, f"{self._root}/{tag}", tag, there[1], _identity(there[0]))

    def _key(self, path: str) -> str:
        if not f"{path}/".startswith(f"{self._root}/"):
            raise CheckpointNotFoundError(f"{path!r} is not below {self._root!r}")
        return "/".join(filter(None, path[len(self._root) :].split("/")))


@dataclass(eq=False)
class RemoteDirectory:
    """One checkpoint in a store, as its manifest was when it was opened."""

    store: Store
    path: str
    tag: str
    raw: bytes
    identity: tuple[int, int]

    def entries(self, parts: Sequence[str] = ()) -> list[tuple[str, Kind]]:
        folders, files = self.store.list("/".join((self.tag, *parts)))
        return [*((name, "dir") for name in folders), *((name, "file") for name in files)]

    def open_read(self, parts: Sequence[str], *, direct: bool = False) -> RemoteFile:
        key = "/".join((self.tag, *parts))
        info = self.store.head(key)
        if info is None:
            raise FileNotFoundError(f"{self.path}: there is no object {key!r}")
        return RemoteFile(self.store, key, f"{self.path}/{'/'.join(parts)}", info.size_bytes)

    def read_file(self, parts: Sequence[str], max_bytes: int) -> bytes:
        """The manifest, as it was when this was opened: nothing else is read as a whole."""
        assert tuple(parts) == (MANIFEST_NAME,)
        return self.raw

    def close(self) -> None:
        return None


@dataclass(eq=False)
class RemoteFile:
    """One object, read in ranges. Calls may overlap."""

    store: Store
    key: str
    path: str
    size_bytes: int
    block_bytes: int = 8 << 20
    """One request for a range."""
    map_path: str = ""
    """There is none: nothing in a store can be mapped."""

    def pread(self, offset: int, num_bytes: int) -> memoryview:
        """What `pread_into` fills a buffer with, in the library's own memory."""
        try:
            data = self.store.get_range(self.key, offset, num_bytes)
        except FileNotFoundError as error:
            told = f"{self.path} was deleted or replaced in the store while it was being read"
            raise CheckpointNotFoundError(told) from error
        if data.nbytes != num_bytes:
            told = f"{self.path} ends at byte {offset + data.nbytes}, {num_bytes - data.nbytes} bytes too early"
            raise CorruptCheckpointError(told, path=self.path)
        return data

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        data = self.pread(offset, buffer.nbytes)
        if data.nbytes:
            move(address_of(buffer), address_of(data), data.nbytes)

    def close(self) -> None:
        return None


def _identity(info: ObjectInfo) -> tuple[int, int]:
    return int.from_bytes(hashlib.sha256(info.e_tag.encode()).digest()[:8], "big"), info.size_bytes
