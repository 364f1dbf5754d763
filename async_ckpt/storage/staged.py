"""A staging directory and how far its checkpoint has come."""

from __future__ import annotations

import enum
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from ..errors import CommitError
from ..format.manifest import CLOCK_KEY
from ..metrics import OnStep
from ..threads.locks import Lock
from .filesystem import FileLock


class State(enum.Enum):
    """A checkpoint's life, in order. ABORTED is reached from every state before COMMITTED."""

    OPEN = "open"
    SEALED = "sealed"
    DURABLE = "durable"
    """Every byte and name below the staging directory is synced; only the rename is missing."""
    COMMITTED = "committed"
    ABORTED = "aborted"


@dataclass
class Staging:
    """A staging directory of this process. `path` holds the files until `publish`."""

    root: str
    tag: str
    path: str
    overwrite: str
    identity: tuple[int, int]
    lock: FileLock | None
    state: State = State.OPEN
    renamed: bool = False
    """The tree has left `path`; what is there now, if anything, is the replaced checkpoint."""
    given_up: bool = False
    """`abort` was called; a publish that has not renamed yet must not."""
    timing: Mapping[str, float] = field(default_factory=dict)
    """Goes into the manifest."""
    on_step: OnStep | None = field(default=None, repr=False)
    """Told about the steps of `publish`, on its thread."""
    turn: Lock = field(default_factory=Lock, repr=False, compare=False)
    """Held by `publish` and `abort`: a deletion by path must never meet what an exchange has just put there."""

    @property
    def final_path(self) -> str:
        """Where the checkpoint will be."""
        return os.path.join(self.root, self.tag)

    def unlock(self) -> None:
        """Let go of the directory lock; idempotent."""
        lock, self.lock = self.lock, None
        if lock is not None:
            lock.close()


def refuse(staging: Staging, why: str) -> NoReturn:
    """Say why it is not committed.

    Raises:
        CommitError: always.
    """
    raise CommitError(f"{why}; tag {staging.tag!r} was not committed", step="manifest", path=staging.path)


def written_by() -> dict[str, str]:
    """What wrote this, and when by its own clock: for people who look into it years later. torch only where it is
    loaded anyway."""
    versions = {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.machine()}",
        CLOCK_KEY: str(time.time_ns()),
    }
    for module in ("async_ckpt", "torch"):
        version = getattr(sys.modules.get(module), "__version__", None)
        if version is not None:
            versions[module] = str(version)
    return versions
