"""How many processes of a node upload at once: one lock file each, held while a checkpoint is sent, given up with the
process."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from concurrent.futures import Executor

from ..storage.filesystem import FileLock, FileSystem
from .parts import opened
from .state import DIRECTORY

_POLL_S = 0.1


class UploadTurns:
    """`num` turns per node and root; None bounds nothing. One event loop."""

    def __init__(self, filesystem: FileSystem, root: str, num: int | None) -> None:
        self._fs = filesystem
        self._folder = os.path.join(root, DIRECTORY)
        self._num = num

    @contextlib.asynccontextmanager
    async def taken(self, executor: Executor) -> AsyncIterator[None]:
        """Wait for a turn and hold it."""
        lock: FileLock | None = None
        while self._num is not None and lock is None:
            lock = await opened(executor, self._try)
            if lock is None:
                await asyncio.sleep(_POLL_S)
        try:
            yield
        finally:
            if lock is not None:
                lock.close()

    def _try(self) -> FileLock | None:
        self._fs.makedirs(self._folder)
        for number in range(self._num or 0):
            path = os.path.join(self._folder, f"uploader.{self._fs.owner().host}.{number}")
            with contextlib.suppress(FileExistsError):
                if self._fs.stat(path).kind == "missing":
                    self._fs.create_file(path, b"")
            lock = self._fs.lock(path)
            if lock is not None:
                return lock
        return None
