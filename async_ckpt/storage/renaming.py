"""The one rename of a commit: onto a free name, in exchange for the old checkpoint, or in two steps where neither can
be had."""

from __future__ import annotations

import contextlib
import errno
import os

from ..errors import CommitError, TagExistsError
from ..format.names import MANIFEST_NAME
from .filesystem import FileSystem
from .private_dirs import link_aside, move_aside, remove_tree, take_apart
from .publish_lock import publish_lock
from .staged import Staging, refuse
from .syscalls import REFUSED

_MAX_RACES = 16
# ENOTEMPTY, EEXIST: the flag was ignored. EXDEV: a directory in the lower layer of an overlay.
_CANNOT_EXCHANGE = REFUSED | {errno.ENOTEMPTY, errno.EEXIST, errno.EXDEV}


def rename_to_final(fs: FileSystem, staging: Staging) -> list[str]:
    """Give the staged tree its final name; returns where the replaced trees are now.

    Raises:
        TagExistsError: somebody else has the tag, and `overwrite` is "refuse". CommitError, OSError: nothing was
            renamed.
    """
    for _ in range(_MAX_RACES):
        try:
            fs.rename_noreplace(staging.path, staging.final_path)
            return []
        except FileExistsError:
            check_final(fs, staging.final_path, staging.tag, staging.overwrite, step="rename")
        if fs.findings.replaces:
            return _replace_without_exchange(fs, staging)
        try:
            with publish_lock(fs, staging.final_path):
                fs.rename_exchange(staging.path, staging.final_path)
            return [staging.path]
        except FileNotFoundError:
            # Deleted in between: then there is nothing to replace. Unless our own side is what is missing.
            if fs.stat(staging.path).kind == "missing":
                raise
        except OSError as error:
            if error.errno not in _CANNOT_EXCHANGE:
                raise
            return _replace_without_exchange(fs, staging)
    refuse(staging, f"other processes kept creating and deleting {staging.final_path!r}")


def _replace_without_exchange(fs: FileSystem, staging: Staging) -> list[str]:
    """Two renames; between them the tag is absent, and `sweep` gives the old tree its name back."""
    aside: list[str] = []
    for _ in range(_MAX_RACES):
        with contextlib.suppress(FileNotFoundError), publish_lock(fs, staging.final_path):
            aside.append(_set_aside(fs, staging))
        try:
            fs.rename_noreplace(staging.path, staging.final_path)
            return aside
        except FileExistsError:
            # Another writer used the gap: its checkpoint is the one to replace now.
            continue
        except OSError as error:
            if not aside:
                raise
            try:
                fs.rename_noreplace(aside[-1], staging.final_path)
            except OSError as second:
                raise CommitError(
                    f"{error}; and the old checkpoint could not be given its name back ({second}): it is whole "
                    f"at {aside[-1]!r}",
                    step="rename",
                    errno=error.errno,
                    path=aside[-1],
                ) from error
            raise
    refuse(staging, f"other processes kept creating {staging.final_path!r}")


def _set_aside(fs: FileSystem, staging: Staging) -> str:
    """Take the name from the old tree, which stays whole under the private name that is returned."""
    try:
        return move_aside(fs, staging.root, staging.tag, staging.final_path, "aside")
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
    # A directory in the lower layer of an overlay.
    aside = link_aside(fs, staging.root, staging.tag, staging.final_path)
    try:
        take_apart(fs, staging.final_path)
        remove_tree(fs, staging.final_path)
    except OSError as error:
        told = f"{error}; the old checkpoint is whole at {aside!r}, tag {staging.tag!r} was not committed"
        raise CommitError(told, step="rename", errno=error.errno, path=aside) from error
    return aside


def check_final(fs: FileSystem, final: str, tag: str, overwrite: str, *, step: str) -> None:
    """Refuse what `overwrite` does not allow to be replaced.

    Raises:
        TagExistsError: the tag is committed and `overwrite` is "refuse", or what is there is no checkpoint.
    """
    if fs.stat(final).kind == "missing":
        return
    if overwrite == "refuse":
        raise TagExistsError(
            f"tag {tag!r} exists already and was left as it is; choose another tag or overwrite='replace'",
            step=step,
            path=final,
        )
    is_checkpoint = fs.stat(os.path.join(final, MANIFEST_NAME)).kind == "file" and fs.stat(final).kind == "dir"
    if not is_checkpoint and fs.stat(final).kind != "missing":
        raise TagExistsError(
            f"{final!r} is not a checkpoint (it has no {MANIFEST_NAME}) and is not replaced", step=step, path=final
        )
