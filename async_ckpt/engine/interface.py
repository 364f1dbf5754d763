"""The five calls: DeepSpeed's `CheckpointEngine` interface as an abstract base class."""

from __future__ import annotations

import abc
from typing import Any

from ..format.names import StrPath as StrPath


def tag_of(tag_or_info: Any) -> str:
    """The tag itself: newer DeepSpeed passes a ``CheckpointCommitInfo`` whose ``tag`` attribute holds it."""
    tag = getattr(tag_or_info, "tag", tag_or_info)
    return tag if isinstance(tag, str) else str(tag)


class CheckpointEngine(abc.ABC):
    """What a training loop, or DeepSpeed, calls to save and load checkpoints.

    Order: `create(tag)`, any number of `makedirs` and `save`, `commit(tag)`. Whether a call blocks is up to the
    implementation. Source: ``deepspeed/runtime/checkpoint_engine/checkpoint_engine.py``.
    """

    def __init__(self, config_params: Any = None) -> None:
        self.name: str | None = None

    @abc.abstractmethod
    def create(self, tag: Any) -> None:
        """Open the checkpoint `tag`."""

    @abc.abstractmethod
    def makedirs(self, path: StrPath, exist_ok: bool = False) -> None:
        """Make a sub-directory of the open checkpoint."""

    @abc.abstractmethod
    def save(self, state_dict: Any, path: StrPath) -> None:
        """Save `state_dict` as `path` of the open checkpoint."""

    @abc.abstractmethod
    def load(self, path: StrPath, map_location: Any = None) -> Any:
        """Load a saved file."""

    @abc.abstractmethod
    def commit(self, tag: Any) -> Any:
        """Make the checkpoint `tag` durable and visible."""
