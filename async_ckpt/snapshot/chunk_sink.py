"""Where filled chunks go. The writer's files are such; the snapshot knows no more of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from ..format.chunk import Chunk


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

    @property
    def num_helpers(self) -> int:
        """How many threads are behind `submit_help`."""

    @property
    def helper_native_ids(self) -> list[int]:
        """Of those threads, as the kernel counts them."""

    def submit_copy(self, fn: Callable[[], None]) -> Future[None]:
        """Run `fn` on the one copy thread, first in first out."""

    def submit_help(self, fn: Callable[[], None]) -> Future[None]:
        """Run `fn` on a thread that helps the caller with what it waits for."""

    def let_go(self) -> bool:
        """Have a file that is written give back memory that it only keeps; False where there is none."""

    def submit_io(self, fn: Callable[[], None]) -> Future[None]:
        """Run `fn`, which may block, on an I/O thread."""
