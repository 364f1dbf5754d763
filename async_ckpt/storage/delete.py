"""Deleting a committed checkpoint: never partly visible, and never another one than was meant."""

from __future__ import annotations

import contextlib
import errno
import os

from ..errors import CheckpointNotFoundError, CorruptCheckpointError
from ..format.manifest import MAX_MANIFEST_BYTES, Manifest, decode
from ..format.names import MANIFEST_NAME, check_tag
from .filesystem import FileSystem
from .private_dirs import make_private, publish_lock, remove_tree, take_apart
from .write_error import write_error


def remove(fs: FileSystem, root: str, tag: str, *, expected: Manifest | None = None) -> None:
    """Delete a committed checkpoint: renamed away, root synced, then deleted. Of a link to one, only the link. With
    `expected`, only the checkpoint with this very manifest, and not one that has taken its name meanwhile.

    Raises:
        CheckpointNotFoundError: there is no such checkpoint (any more); nothing was deleted.
        WriteError: a step failed; the checkpoint is whole under its name, or what is left of it has a private name.
    """
    final = os.path.join(root, check_tag(tag))
    try:
        kind = fs.stat(final).kind
        is_link = kind == "other" and expected is None and _leads_to_one(fs, final)
        if not is_link and (kind != "dir" or fs.stat(os.path.join(final, MANIFEST_NAME)).kind != "file"):
            raise CheckpointNotFoundError(f"there is no checkpoint {tag!r} in {root!r}; nothing was deleted")
        if is_link:
            # What it points to may be somebody else's. A directory that has taken its name meanwhile is refused.
            fs.unlink(final)
            fs.fsync_dir(root)
            return
        trash = _take_away(fs, root, tag, final, expected)
        fs.fsync_dir(root)
        remove_tree(fs, trash)
    except CheckpointNotFoundError:
        raise
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(f"checkpoint {tag!r} was deleted by another process") from error
    except OSError as error:
        raise write_error(fs, error, f"deleting checkpoint {tag!r} failed", final) from error


def _take_away(fs: FileSystem, root: str, tag: str, final: str, expected: Manifest | None) -> str:
    """Rename the tree to a private name of which nobody makes anything but rubbish; returns where it is."""
    with publish_lock(fs, final) as is_exclusive:
        identity = fs.stat(final).identity
        if expected is not None and _manifest(fs, final) != expected:
            raise _replaced(tag)
        try:
            if is_exclusive:
                return make_private(fs, root, tag, "trash", final)
            aside = make_private(fs, root, tag, "aside", final)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # A directory in the lower layer of an overlay.
            take_apart(fs, final)
            return final
    # No locks here: look at what was moved before it counts as rubbish. A sweep gives an "aside" its name back.
    if fs.stat(aside).identity != identity:
        # Replaced between the look and the rename: give it its name back, unless a yet newer one has that already.
        with contextlib.suppress(FileExistsError):
            fs.rename_noreplace(aside, final)
            raise _replaced(tag)
    return make_private(fs, root, tag, "trash", aside)


def _manifest(fs: FileSystem, final: str) -> Manifest | None:
    """Not the directory's identity: the number of a deleted directory is soon that of a new one."""
    path = os.path.join(final, MANIFEST_NAME)
    try:
        return decode(fs.read_file(path, MAX_MANIFEST_BYTES), source=path)
    except CorruptCheckpointError:
        return None


def _leads_to_one(fs: FileSystem, link: str) -> bool:
    try:
        return _manifest(fs, link) is not None
    except (FileNotFoundError, NotADirectoryError):
        return False


def _replaced(tag: str) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(f"checkpoint {tag!r} was replaced by another process; nothing was deleted")
