"""A file system in memory whose every step can be held, failed and watched; and chunks that count their releases."""

from __future__ import annotations

import asyncio
import mmap
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

from async_ckpt.format.checksum import crc32
from async_ckpt.format.chunk import Chunk
from async_ckpt.writer.file import FileWrite
from async_ckpt.writer.pool import WriterPool

TIMEOUT_S = 20.0


class Gate:
    """Holds whoever passes until opened; says how many are inside."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._is_open = False
        self.num_inside = 0

    def __call__(self, *_: object) -> None:
        with self._condition:
            self.num_inside += 1
            self._condition.notify_all()
            while not self._is_open:
                assert self._condition.wait(TIMEOUT_S), "nobody opened the gate"

    def wait_inside(self, count: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self.num_inside >= count, TIMEOUT_S), f"only {self.num_inside} came"

    def open(self) -> None:
        with self._condition:
            self._is_open = True
            self._condition.notify_all()


class FakeFile:
    def __init__(self, owner: FakeFileSystem, path: str, size_bytes: int, direct: bool, executor: Executor) -> None:
        self.path = path
        self.size_bytes = size_bytes
        self.stamp = None
        self.direct = direct
        self.data = bytearray()
        self.num_running = 0
        self.num_closed = 0
        self._owner = owner
        self._executor = executor

    def _work(self, kind: str, work: Callable[[], None], offset: int) -> None:
        assert self.num_closed == 0 or kind == "close", f"{kind} after close"
        self.num_running += kind != "close"
        try:
            self._owner.step(kind, self.path, offset)
            work()
        finally:
            self.num_running -= kind != "close"

    def pwrite(self, buffer: memoryview, offset: int) -> None:
        def work() -> None:
            self.data.extend(bytes(max(0, offset + len(buffer) - len(self.data))))
            self.data[offset : offset + len(buffer)] = buffer

        self._work("write", work, offset)

    def truncate(self, size_bytes: int) -> None:
        def work() -> None:
            del self.data[size_bytes:]

        self._work("truncate", work, 0)

    def fsync(self) -> None:
        self._work("fsync", lambda: None, 0)

    async def close(self) -> None:
        def work() -> None:
            assert self.num_running == 0, "closed under a running write"
            self.num_closed += 1

        await asyncio.get_running_loop().run_in_executor(self._executor, self._work, "close", work, 0)


class FakeFileSystem:
    """Only what the pool uses."""

    def __init__(self) -> None:
        self.log: list[tuple[str, str, int]] = []
        self.files: dict[str, FakeFile] = {}
        self.on: dict[str, Callable[[str, int], Any]] = {}
        self.most_at_once: dict[str, int] = defaultdict(int)
        self._now: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()

    def step(self, kind: str, path: str, offset: int = 0) -> None:
        with self._lock:
            self.log.append((kind, path, offset))
            self._now[kind] += 1
            self.most_at_once[kind] = max(self.most_at_once[kind], self._now[kind])
        try:
            if kind in self.on:
                self.on[kind](path, offset)
        finally:
            with self._lock:
                self._now[kind] -= 1

    def kinds(self) -> list[str]:
        with self._lock:
            return [kind for kind, _, _ in self.log]

    def makedirs(self, path: str) -> None:
        self.step("makedirs", path)

    async def open_write(self, path: str, size_bytes: int, *, direct: bool, executor: Executor) -> FakeFile:
        await asyncio.get_running_loop().run_in_executor(executor, self.step, "open", path)
        self.files[path] = FakeFile(self, path, size_bytes, direct, executor)
        return self.files[path]


def aligned(data: bytes, capacity: int) -> memoryview:
    """`data` in page-aligned memory of `capacity` bytes."""
    memory = mmap.mmap(-1, max(capacity, 4096))
    memory[: len(data)] = data
    return memoryview(memory)


class Source:
    """A file's content in chunks; counts the releases of each."""

    def __init__(self, size_bytes: int, chunk_bytes: int) -> None:
        self.data = bytes(k * 7 % 251 for k in range(size_bytes))
        self.size_bytes = size_bytes
        self.releases: dict[int, int] = {}
        self.all_released = threading.Event()
        self._lock = threading.Lock()
        self.chunks = [self._chunk(low, chunk_bytes) for low in range(0, size_bytes, chunk_bytes)]
        self.crcs = tuple(crc32(self.data[c.offset : c.offset + c.nbytes]) for c in self.chunks)

    def _chunk(self, offset: int, chunk_bytes: int) -> Chunk:
        part = self.data[offset : offset + chunk_bytes]
        self.releases[offset] = 0
        return Chunk(offset, len(part), aligned(part, -(-chunk_bytes // 4096) * 4096), lambda: self._release(offset))

    def _release(self, offset: int) -> None:
        with self._lock:
            self.releases[offset] += 1
            if all(self.releases.values()):
                self.all_released.set()

    def submit(self, file: FileWrite) -> FileWrite:
        for chunk in self.chunks:
            file.submit(chunk)
        return file

    def write(self, pool: WriterPool, path: str = "f", **how: Any) -> FileWrite:
        return self.submit(pool.open_file(path, size_bytes=self.size_bytes, seal=seal, **how))

    def assert_released_once(self) -> None:
        assert self.all_released.wait(TIMEOUT_S), f"not released: {self.releases}"
        assert set(self.releases.values()) == {1}, self.releases


def seal(offset: int, view: memoryview) -> int:
    return crc32(view)
