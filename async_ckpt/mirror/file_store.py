"""A mirror on another disk or a network mount, with the same layout as in an object store.

Objects are written under a private name, synced and renamed. Conditions are checked and met under a lock of the
object's directory; they hold among writers that see each other's locks.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import time
from collections.abc import Iterator, Sequence

from ..errors import MirrorError
from ..host.process import Owner, OwnerState
from ..storage.filesystem import FileSystem
from ..storage.private_dirs import replacing
from ..storage.write_file import create_of_parts
from .store import ANY_VERSION, ConditionFailed, ObjectInfo

_PART = ".part-"
_LOCK_TIMEOUT_S = 10.0
_numbers = itertools.count()


class FileStore:
    """See `store.Store`."""

    def __init__(self, url: str, directory: str, filesystem: FileSystem) -> None:
        self.url = url
        self._directory = directory
        self._fs = filesystem

    def put(self, key: str, parts: Iterator[memoryview], *, size_bytes: int, part_bytes: int, parallel: int) -> None:
        with self._replacing(key) as private:
            create_of_parts(self._fs, private, parts, size_bytes)

    def put_if(self, key: str, data: bytes, replaced: ObjectInfo | None) -> None:
        with self._locked(key):
            if replaced is not ANY_VERSION and self.head(key) != replaced:
                told = "is there already" if replaced is None else "was changed"
                raise ConditionFailed(f"{key!r} {told}", url=self.url)
            with self._replacing(key) as private:
                self._fs.create_file(private, data)

    def read(self, key: str, max_bytes: int) -> tuple[ObjectInfo, bytes] | None:
        info = self.head(key)
        if info is None:
            return None
        try:
            return info, bytes(self.get_range(key, 0, info.size_bytes)) if info.size_bytes <= max_bytes else b""
        except FileNotFoundError:
            return None

    def get_range(self, key: str, offset: int, num_bytes: int) -> memoryview:
        with (
            self._telling(f"reading {key!r}", FileNotFoundError),
            contextlib.closing(self._fs.open_read(self._directory, key.split("/"))) as file,
        ):
            data = memoryview(bytearray(max(0, min(num_bytes, file.size_bytes - offset))))
            file.pread_into(data, offset)
            return data

    def head(self, key: str) -> ObjectInfo | None:
        with self._telling(f"looking at {key!r}"):
            found = self._fs.stat(self._path(key))
        if found.kind != "file":
            return None
        return ObjectInfo(found.size_bytes, f"{found.identity[1]:x}-{found.mtime_ns:x}-{found.size_bytes:x}")

    def list(self, folder: str) -> tuple[Sequence[str], Sequence[str]]:
        path = self._path(folder)
        found: dict[str, list[str]] = {"dir": [], "file": []}
        with contextlib.suppress(FileNotFoundError), self._telling(f"listing {folder!r}", FileNotFoundError):
            for name in sorted(self._fs.listdir(path)):
                if not name.startswith(_PART):
                    found.setdefault(self._fs.stat(os.path.join(path, name)).kind, []).append(name)
        return found["dir"], found["file"]

    def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            path = self._path(key)
            with self._telling(f"deleting {key!r}"):
                with contextlib.suppress(FileNotFoundError):
                    self._fs.unlink(path)
                # Folders are the file system's own; an object store has none.
                folder = os.path.dirname(path)
                while len(folder) > len(self._directory):
                    try:
                        self._fs.rmdir(folder)
                    except OSError as error:
                        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                            raise
                        break
                    folder = os.path.dirname(folder)

    def discard_parts(self, key: str) -> None:
        folder, name = os.path.split(self._path(key))
        lost = (FileNotFoundError, NotADirectoryError)
        with contextlib.suppress(*lost), self._telling(f"deleting parts of {key!r}", *lost):
            for found in self._fs.listdir(folder):
                owner = Owner.parse(found.removeprefix(f"{_PART}{name}-").rpartition("-")[0])
                if owner is not None and self._fs.owner_state(owner) is not OwnerState.ALIVE:
                    self._fs.unlink(os.path.join(folder, found))

    def refuses_damage(self, key: str) -> bool:
        # Nothing lies in between.
        return True

    def _path(self, key: str) -> str:
        return os.path.join(self._directory, key) if key else self._directory

    @contextlib.contextmanager
    def _replacing(self, key: str) -> Iterator[str]:
        """A private name to write to, which gets the object's own afterwards, durably."""
        path = self._path(key)
        folder, name = os.path.split(path)
        private = os.path.join(folder, f"{_PART}{name}-{self._fs.owner()}-{next(_numbers)}")
        with self._telling(f"writing {key!r}"):
            self._fs.makedirs(folder)
            with replacing(self._fs, path, private):
                yield private
            while len(folder) > len(self._directory):
                folder = os.path.dirname(folder)
                self._fs.fsync_dir(folder)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        folder = os.path.dirname(self._path(key))
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        with self._telling(f"writing {key!r}"):
            self._fs.makedirs(folder)
            while (lock := self._fs.lock(folder)) is None:
                if time.monotonic() > deadline:
                    raise MirrorError(f"another process has held {folder!r} for {_LOCK_TIMEOUT_S:g} s", url=self.url)
                time.sleep(0.01)
        with contextlib.closing(lock):
            yield

    @contextlib.contextmanager
    def _telling(self, what: str, *passed: type[OSError]) -> Iterator[None]:
        """Raise errors of the file system as the mirror's, except those `passed`."""
        try:
            yield
        except OSError as error:
            if isinstance(error, (MirrorError, *passed)):
                raise
            raise MirrorError(f"{what} failed ({error}); local checkpoints are untouched", url=self.url) from error
