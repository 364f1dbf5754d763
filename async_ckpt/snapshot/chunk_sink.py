"""Where filled chunks go. The writer's files are such; the snapshot knows no more of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from ..format.chunk import Chunk
from ..threads.executor import DaemonExecutor


class ChunkSink(Protocol):
    """One file, from its first chunk to its last. Any thread; never blocks."""

    def submit(self, *chunks: Chunk) -> None:
        """Take over the next chunks in every case, also when it raises: each is released exactly once."""

    def has_taken(self, offset: int) -> bool:
        """Whether the chunk at `offset` was taken over."""

    def abort(self, error: BaseException) -> None:
        """Give the file up because of `error`."""


class CopyPool(Protocol):
    """The threads that a snapshotter uses. Never blocks; any call raises when they are gone."""

    copier: DaemonExecutor
    """One thread, for what is copied behind the caller."""
    helpers: DaemonExecutor
    """For what the caller waits for."""

    def let_go(self) -> bool:
        """Have a file that is written give back memory that it only keeps; False where there is none."""

    def submit_io(self, fn: Callable[[], None]) -> Future[None]:
        """Run `fn`, which may block, on an I/O thread."""
