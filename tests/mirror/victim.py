"""A process that mirrors a root and is killed in the middle: ``python -m tests.mirror.victim ROOT URL OPTIONS
KILL_AT_STEP``.

Steps are the calls that change the state on disk, numbered from 1. With 0 it uploads in a process of its own, as a
training does, and lives until everything is mirrored.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from async_ckpt.mirror.config import Mirror
from async_ckpt.mirror.mirrors import Mirrors
from async_ckpt.reading.catalog import Catalog
from async_ckpt.storage.filesystem import FileSystem


class Mortal(FileSystem):
    def __init__(self, kill_at: int) -> None:
        super().__init__()
        self.kill_at = kill_at
        self.num_steps = 0

    def _step(self, path: str) -> None:
        if ".mirrors" in path:
            self.num_steps += 1
            if self.num_steps == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def create_file(self, path: str, data: bytes) -> None:
        self._step(path)
        super().create_file(path, data)

    def rename(self, src: str, dst: str) -> None:
        self._step(dst)
        super().rename(src, dst)

    def fsync_dir(self, path: str) -> None:
        self._step(path)
        super().fsync_dir(path)

    def unlink(self, path: str) -> None:
        self._step(path)
        super().unlink(path)


def main() -> None:
    root, url, options, kill_at = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    fs = Mortal(kill_at) if kill_at else FileSystem()
    mirror = Mirror(url, part_bytes=5 << 20, retry_timeout_s=10.0, request_timeout_s=5.0, options=options)
    made = Mirrors([mirror], filesystem=fs, root=root, may_overwrite=True)
    local = [Catalog(root).manifest(tag) for tag in Catalog(root).tags()]
    while not all(made.is_mirrored(manifest.tag, manifest.created_unix_ns) for manifest in local):
        time.sleep(0.01)
    made.close(10)


if __name__ == "__main__":
    main()
