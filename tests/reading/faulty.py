"""A file system whose k-th read of file content fails."""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from typing import Any

from async_ckpt.storage.filesystem import DirHandle, FileSystem, ReadableFile


class FaultyFileSystem(FileSystem):
    """Counts reads of files in checkpoints (not of manifests); `fail_at(k)` makes the k-th one from now raise EIO."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0
        self._countdown: int | None = None
        self._counting = threading.Lock()

    def fail_at(self, k: int) -> None:
        self._countdown = k

    def open_dir(self, root: str, parts: Sequence[str] = ()) -> Any:
        return _Directory(super().open_dir(root, parts), self)

    def count(self) -> None:
        with self._counting:
            self.num_reads += 1
            if self._countdown is not None:
                self._countdown -= 1
                if self._countdown < 0:
                    raise OSError(errno.EIO, "injected")


class _Directory:
    def __init__(self, inner: DirHandle, faults: FaultyFileSystem) -> None:
        self._inner, self._faults = inner, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def open_read(self, parts: Sequence[str], *, direct: bool = False) -> Any:
        return _File(self._inner.open_read(parts, direct=direct), self._faults)


class _File:
    def __init__(self, inner: ReadableFile, faults: FaultyFileSystem) -> None:
        self._inner, self._faults = inner, faults

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def pread_into(self, buffer: memoryview, offset: int) -> None:
        self._faults.count()
        self._inner.pread_into(buffer, offset)
