"""Who renames: the seam between an engine and the other ranks of its job.

A `Coordinator` opens one staging directory per checkpoint, learns from every rank that its part is durable, and
publishes. `LocalCoordinator` is the single process: no waiting, no store.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Protocol

from ..format.manifest import Manifest
from ..storage import transaction
from ..storage.filesystem import FileSystem
from ..storage.staged import Destination, Staging


class Coordinator(Protocol):
    """Opens, publishes and gives up checkpoints on behalf of one rank."""

    rank: int
    world_size: int
    leads: bool
    """Whether this rank makes, renames and deletes checkpoint directories."""
    num_sharing: int
    """How many ranks may write one file together: all, where they have one root."""

    def bind(self, filesystem: FileSystem, root: str) -> None:
        """Called once by the engine that uses this coordinator."""

    def begin(self, destination: Destination, overwrite: str) -> Staging:
        """Open a checkpoint there. Training thread; must not wait for other ranks."""

    def admit(self, staging: Staging, path: str, manifest_bytes: int) -> Future[str]:
        """The staging directory, once the manifest is known to have room for the file `path` beside those of all ranks.
        Training thread; does not block. The future raises CommitError: it has none, and the checkpoint is given up.
        """

    def publish(self, staging: Staging, part: Manifest) -> None:
        """Make the checkpoint durable and visible once every rank's part is durable; `part` is this rank's. Worker
        thread; blocks.

        Raises:
            CommitError: nothing is visible (or, with `committed=None`, that is unknown); on every rank alike.
        """

    def abort(self, staging: Staging, error: BaseException) -> None:
        """Give the checkpoint up, tell the other ranks why, and remove what is staged. Worker thread."""

    def sweep(self) -> None:
        """Remove stale staging of dead owners. Called once, when the engine starts."""

    def close(self) -> None:
        """Let go of connections; no call follows."""


class LocalCoordinator:
    """A single process: it makes, publishes and removes its own staging directories."""

    rank = 0
    world_size = num_sharing = 1
    leads = True

    def bind(self, filesystem: FileSystem, root: str) -> None:
        self._fs, self._root = filesystem, root

    def begin(self, destination: Destination, overwrite: str) -> Staging:
        destination.prepare(self._fs, leads=True, overwrite=overwrite)
        return transaction.begin(self._fs, Staging(destination, overwrite))

    def admit(self, staging: Staging, path: str, manifest_bytes: int) -> Future[str]:
        return staging.location

    def publish(self, staging: Staging, part: Manifest) -> None:
        taken_in = staging.destination.take_in(self._fs, staging.path)
        transaction.publish(self._fs, staging, replace(part, files=(*part.files, *taken_in)))
        staging.destination.published(self._fs)

    def abort(self, staging: Staging, error: BaseException) -> None:
        transaction.abort(self._fs, staging)

    def sweep(self) -> None:
        transaction.sweep(self._fs, self._root)

    def close(self) -> None:
        return None
