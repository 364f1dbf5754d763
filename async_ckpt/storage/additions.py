"""What other code writes into a checkpoint's folder while that is on its way: a callback's adapter, a tokenizer, notes.

Where checkpoints may be replaced, such files are no obstacle to the commit: they stay in the folder, as files that no
manifest lists, whether the folder was new or held the checkpoint that is replaced.
"""

from __future__ import annotations

import logging
import os

from ..errors import CorruptCheckpointError, report
from ..format.manifest import MAX_MANIFEST_BYTES, decode
from ..format.names import MANIFEST_NAME
from .filesystem import FileSystem
from .private_dirs import tree_of


def are_all(fs: FileSystem, folder: str) -> bool:
    """Whether `folder` is one, and no checkpoint."""
    return fs.stat(folder).kind == "dir" and fs.stat(os.path.join(folder, MANIFEST_NAME)).kind == "missing"


def exchange(fs: FileSystem, staged: str, final: str) -> None:
    """Give `staged` the name of the folder at `final`, which is at `staged` then.

    Whoever goes on writing there finds the folders that he has made, but for one made at this very moment: that is
    missing until it was moved. Raises OSError: nothing was exchanged.
    """
    for inner, found in tree_of(fs, final, may_vanish=True):
        if found.kind == "dir":
            fs.makedirs(os.path.join(staged, inner))
    fs.rename_exchange(staged, final)


def move(fs: FileSystem, old: str, final: str, since_ns: int) -> None:
    """Give the checkpoint at `final` what was added to the folder that it has replaced: all, where that was no
    checkpoint, and else what was written since then and is none of its files. A process that is killed in between loses
    what was not moved.
    """
    added = {inner: there.mtime_ns for inner, there in tree_of(fs, old) if there.kind != "dir"}
    if not are_all(fs, old):
        added = {inner: written_ns for inner, written_ns in added.items() if written_ns >= since_ns}
        for inner in _listed(fs, old) if added else ():
            added.pop(inner, None)
    given_way = []
    for inner in added:
        target = os.path.join(final, inner)
        if fs.stat(target).kind == "missing":
            fs.makedirs(os.path.dirname(target))
            fs.rename(os.path.join(old, inner), target)
        else:
            given_way.append(inner)
    if given_way:
        told = "%s: %s and %d others, written there before the commit by other code, gave way to what was saved"
        report(logging.WARNING, told, final, given_way[0], len(given_way) - 1)


def _listed(fs: FileSystem, folder: str) -> list[str]:
    """The files of the checkpoint in `folder`; where its manifest is damaged, all that it holds."""
    path = os.path.join(folder, MANIFEST_NAME)
    try:
        manifest = decode(fs.read_file(path, MAX_MANIFEST_BYTES), source=path)
    except CorruptCheckpointError:
        return [inner for inner, _ in tree_of(fs, folder)]
    return [MANIFEST_NAME, *(entry.path for entry in manifest.files)]
