"""`StatusObserver`: publish also where other machines can see it."""

from __future__ import annotations

import os

from ..metrics import Observer


class StatusObserver(Observer):
    """Makes the engine publish its status into `directory` too, for `async-ckpt watch` on other machines.

    Every engine publishes for this machine by itself (see `status_places`); give this one where a training runs on one
    machine and is watched from another, through a shared root:
    ``AsyncCheckpointEngine(root, observers=(StatusObserver(root),))``. The file is written by a thread of its own, never
    synced, and removed when the engine is closed.

    Args:
        directory: an existing directory, as a rule the engine's root.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = os.path.abspath(os.fspath(directory))
