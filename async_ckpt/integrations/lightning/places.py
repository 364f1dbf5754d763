"""Where one `.ckpt` file belongs, and where its manifest does.

    <dirpath>/epoch=3.ckpt                            the checkpoint: one plain torch file, its only name
    <dirpath>/.async_ckpt/epoch=3.ckpt/manifest.json  its sizes and CRCs
    <dirpath>/.async_ckpt/.staging...                 in flight

Deleting a `.ckpt` by hand frees its space; the next run removes the left-over manifest.
"""

from __future__ import annotations

import os
from typing import Any

from ...errors import ConfigError
from ...format.names import SINGLE_FILES_NAME, single_file_tag
from ...ranks.coordinator import Destination

DATA_NAME = "state.ckpt"


class CheckpointFile(Destination):
    """One checkpoint file. `root` holds the folder's manifests and staging directories; `tag` is the file's name, or a
    digest of it.
    """

    final: str
    """The file's absolute path."""

    def __init__(self, final: str) -> None:
        folder, name = os.path.split(final)
        super().__init__(os.path.join(folder, SINGLE_FILES_NAME), single_file_tag(name))
        object.__setattr__(self, "final", final)

    @classmethod
    def of(cls, path: Any) -> CheckpointFile:
        """From what Lightning passes.

        Raises:
            ConfigError: a URL; only local paths can be committed by a rename.
        """
        text = os.fspath(path)
        text = text.removeprefix("file://")
        if "://" in text:
            raise ConfigError(
                f"AsyncCkptIO writes to local or mounted file systems only, not to {text!r}; use Lightning's own "
                "plugin there"
            )
        return cls(os.path.abspath(text))

    @property
    def folder(self) -> str:
        """The directory that holds the file."""
        return os.path.dirname(self.final)

    @property
    def name(self) -> str:
        """The file's name."""
        return os.path.basename(self.final)

    @property
    def record(self) -> str:
        """The directory that holds the manifest."""
        return os.path.join(self.root, self.tag)

    @property
    def staged(self) -> str:
        """The file's name between its commit and its move to `final`."""
        return os.path.join(self.record, DATA_NAME)
