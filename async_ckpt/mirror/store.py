"""The seam to a store: a few methods, so that another library or service can be brought.

Keys are below the mirror's prefix. Every method may be called from any thread, and blocks. They raise
`FileNotFoundError` for an object that is not there, and `MirrorError` for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..errors import MirrorError

PROBE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ObjectInfo:
    """What a store says of an object; `e_tag` changes with its content, `version` (where a store has one) with each
    put."""

    size_bytes: int
    e_tag: str
    version: str | None = None


ANY_VERSION = ObjectInfo(-1, "*")
"""For `Store.put_if`: whatever is there, or nothing."""


class ConditionFailed(MirrorError):
    """The object is there already, or is no longer the one that was to be replaced. Nothing was changed."""


class PassingFailure(MirrorError):
    """A failure that may pass: a connection that broke, a server that is overloaded or restarting. It may have been
    done all the same."""


class AbortedElsewhere(PassingFailure):
    """Another process, which uploads the same checkpoint, has removed the parts of this upload."""


class Store(Protocol):
    """One mirror's place in a store. See the module docstring for threads and errors."""

    url: str

    def put(self, key: str, parts: Iterator[memoryview], *, size_bytes: int, part_bytes: int, parallel: int) -> None:
        """Make or replace an object of `parts`, atomically; all but the last have `part_bytes` bytes. Each is let go
        once it is sent."""

    def put_if(self, key: str, data: bytes, replaced: ObjectInfo | None) -> None:
        """Put a small object only where there is none (`replaced` None), in place of exactly that one, or always
        (`ANY_VERSION`).

        Raises:
            ConditionFailed: the condition does not hold (in a store that knows conditions).
        """

    def read(self, key: str, max_bytes: int) -> tuple[ObjectInfo, bytes] | None:
        """A small object; without its bytes where it has more than `max_bytes`. None where there is none."""

    def get_range(self, key: str, offset: int, num_bytes: int) -> memoryview:
        """Bytes of an object; fewer where it ends before."""

    def head(self, key: str) -> ObjectInfo | None:
        """What is there; None where nothing is."""

    def list(self, folder: str) -> tuple[Sequence[str], Sequence[str]]:
        """Names of the folders and of the objects that are directly in `folder`; none where there is no such folder."""

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; those that are not there do not matter."""

    def discard_parts(self, key: str) -> None:
        """Remove what interrupted calls of `put` left of this object."""

    def refuses_damage(self, key: str) -> bool:
        """Whether the store compares what arrives with its checksum: found out by a few wrong bytes under `key`."""
