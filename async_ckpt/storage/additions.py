"""What other code writes into a checkpoint's folder before there is one: a callback's adapter, a tokenizer, notes.

Where checkpoints may be replaced, such a folder is no obstacle to the commit: the checkpoint takes its name, and its
files move in as files that no manifest lists.
"""

from __future__ import annotations

import logging
import os

from ..errors import report
from ..format.names import MANIFEST_NAME
from .filesystem import FileSystem
from .private_dirs import tree_of


def are_all(fs: FileSystem, folder: str) -> bool:
    """Whether `folder` is one, and no checkpoint."""
    return fs.stat(folder).kind == "dir" and fs.stat(os.path.join(folder, MANIFEST_NAME)).kind == "missing"


def exchange(fs: FileSystem, staged: str, final: str) -> None:
    """Give `staged` the name of the folder at `final`, whose files move in; what is left of it is at `staged`.

    Whoever goes on writing there finds the folders that he has made, but for one made at this very moment: that is
    missing until it was moved. A process that is killed in between loses what was not moved. Raises OSError: nothing
    was exchanged, or all the files are at `staged` or `final`.
    """
    for inner, found in tree_of(fs, final, may_vanish=True):
        if found.kind == "dir":
            fs.makedirs(os.path.join(staged, inner))
    fs.rename_exchange(staged, final)
    given_way = []
    for inner, found in tree_of(fs, staged):
        target = os.path.join(final, inner)
        if found.kind == "dir":
            fs.makedirs(target)
        elif fs.stat(target).kind == "missing":
            fs.rename(os.path.join(staged, inner), target)
        else:
            given_way.append(inner)
    if given_way:
        told = "%s: %s and %d others, written there before the commit by other code, gave way to what was saved"
        report(logging.WARNING, told, final, given_way[0], len(given_way) - 1)
