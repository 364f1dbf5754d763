"""Who renames: the seam between an engine and the other ranks of its job.

A `Coordinator` opens one staging directory per checkpoint, learns from every rank that its part is durable, and
publishes. `LocalCoordinator` is the single process: no waiting, no store.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from ..format.manifest import FileEntry
from ..storage import transaction
from ..storage.filesystem import FileSystem


@dataclass(frozen=True)
class Destination:
    """Where a checkpoint goes: the directory `tag` below `root`, an absolute path.

    Integrations add what they know of it, and what they do there besides. What a hook raises fails the checkpoint on
    all ranks.
    """

    root: str
    tag: str

    def prepare(self, filesystem: FileSystem, *, leads: bool, overwrite: str) -> None:
        """Called before anything is staged; `leads` on the rank that makes the directory. Training thread."""

    def take_in(self, filesystem: FileSystem, staging: str) -> Sequence[FileEntry]:
        """Add durable files to the staging directory, once this rank's others are. Worker thread; blocks."""
        return ()

    def published(self, filesystem: FileSystem) -> None:
        """Called on the rank that has renamed, before any rank reports success. Worker thread; blocks."""


@dataclass(slots=True)
class OpenTag:
    """One checkpoint that is being staged by this rank.

    `location` resolves to the absolute path of the staging directory (at once for a single process; for other ranks
    when rank 0 has made it). `staging` is set where this rank made the directory and so renames or removes it.
    """

    destination: Destination
    overwrite: str
    location: Future[str]
    staging: transaction.Staging | None = None

    @property
    def tag(self) -> str:
        """The checkpoint's tag."""
        return self.destination.tag


class Coordinator(Protocol):
    """Opens, publishes and gives up checkpoints on behalf of one rank."""

    rank: int
    world_size: int

    @property
    def leads(self) -> bool:
        """Whether this rank makes, renames and deletes checkpoint directories."""

    def bind(self, filesystem: FileSystem, root: str) -> None:
        """Called once by the engine that uses this coordinator."""

    def begin(self, destination: Destination, overwrite: str) -> OpenTag:
        """Open a checkpoint there. Training thread; must not wait for other ranks."""

    def publish(
        self, opened: OpenTag, files: Sequence[FileEntry], metadata: Mapping[str, Any], created_unix_ns: int
    ) -> None:
        """Make the checkpoint durable and visible once every rank's part is durable. Worker thread; blocks.

        Raises:
            CommitError: nothing is visible (or, with `committed=None`, that is unknown); on every rank alike.
        """

    def abort(self, opened: OpenTag, error: BaseException) -> None:
        """Give the checkpoint up, tell the other ranks why, and remove what is staged. Worker thread."""

    def sweep(self) -> None:
        """Remove stale staging of dead owners. Called once, when the engine starts."""

    def close(self) -> None:
        """Let go of connections; no call follows."""


class LocalCoordinator:
    """A single process: it makes, publishes and removes its own staging directories."""

    rank = 0
    world_size = 1
    leads = True

    def __init__(self) -> None:
        self._filesystem: FileSystem | None = None
        self._root = ""

    def bind(self, filesystem: FileSystem, root: str) -> None:
        self._filesystem = filesystem
        self._root = root

    @property
    def _fs(self) -> FileSystem:
        assert self._filesystem is not None, "bind() comes first"
        return self._filesystem

    def begin(self, destination: Destination, overwrite: str) -> OpenTag:
        destination.prepare(self._fs, leads=True, overwrite=overwrite)
        staging = transaction.begin(self._fs, destination.root, destination.tag, overwrite)
        location: Future[str] = Future()
        location.set_result(staging.path)
        return OpenTag(destination, overwrite, location, staging)

    def publish(
        self, opened: OpenTag, files: Sequence[FileEntry], metadata: Mapping[str, Any], created_unix_ns: int
    ) -> None:
        assert opened.staging is not None
        entries = [*files, *opened.destination.take_in(self._fs, opened.staging.path)]
        transaction.publish(self._fs, opened.staging, entries, metadata, created_unix_ns)
        opened.destination.published(self._fs)

    def abort(self, opened: OpenTag, error: BaseException) -> None:
        assert opened.staging is not None
        transaction.abort(self._fs, opened.staging)

    def sweep(self) -> None:
        transaction.sweep(self._fs, self._root)

    def close(self) -> None:
        return None
