"""Files in a tag folder that did not come through the engine: NVMe-offloaded state."""

from __future__ import annotations

import errno
import os

from ...format.manifest import FileEntry
from ...storage.filesystem import FileSystem
from ..adopting import read_entries

OFFLOADED_NAME = "offloaded_tensors"
_STILL_USED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)


def take_in(filesystem: FileSystem, folder: str, staging: str, rank_name: str, rank: int | None) -> list[FileEntry]:
    """Move what DeepSpeed copied to `<folder>/offloaded_tensors/<rank_name>` into the staging directory.

    The emptied folders go too, so that the staging directory can take their name. Worker thread; blocks.
    """
    source = os.path.join(folder, OFFLOADED_NAME, rank_name)
    if filesystem.stat(source).kind != "dir":
        return []
    filesystem.makedirs(os.path.join(staging, OFFLOADED_NAME))
    filesystem.rename(source, os.path.join(staging, OFFLOADED_NAME, rank_name))
    for emptied in (os.path.dirname(source), folder):
        try:
            filesystem.rmdir(emptied)
        except OSError as error:
            # Other ranks' folders are still there: the last one to move its own removes it.
            if error.errno not in _STILL_USED:
                raise
    return list(read_entries(filesystem, staging, f"{OFFLOADED_NAME}/{rank_name}", rank))
