"""One checkpoint's way to its final name: staging directory, syncs, rename; and what crashes leave behind.

The order, each step only after the one before has succeeded: manifest written and synced, every directory of the
staging tree synced (deepest first), rename to the final name, root synced. Only then is anything reported or an old
tree deleted. Before a `sweep` or `remove` deletes, the root is synced too: otherwise power loss could bring a name
back and find its files gone.

Guarantees:
- `<root>/<tag>` is absent or whole at every instant, also for a process killed between any two calls here.
- Of several writers of one tag with overwrite "refuse" exactly one publishes.
- A tree is deleted only under a private name, and only if it is ours or its owner is certainly gone.
- A deletion or replacement takes away the very tree it has looked at, whoever else is at work on that tag.

All functions are synchronous, block on the disk and may run in any thread; one `Staging` belongs to one thread at a
time. They raise the package's errors; the `OSError` is the cause.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TypeVar

from ..errors import (
    CheckpointNotFoundError,
    CommitError,
    OutOfSpaceError,
    TagExistsError,
    TransactionStateError,
    UnsafePathError,
    report,
)
from ..format.manifest import CLOCK_KEY, Manifest, encode
from ..format.names import MANIFEST_NAME, check_relative_path, check_tag, parse_private_name
from ..host.process import OwnerState
from .delete import remove, sweep
from .filesystem import FileSystem
from .private_dirs import lock_or_none, make_private, remove_tree, tree_of
from .root import make_root, unmake
from .staged import Staging, State, check_final, create_file, move_additions, refuse, rename_to_final
from .syscalls import REFUSED
from .write_error import as_write_error

S = TypeVar("S", bound=Staging)

__all__ = [
    "abort",
    "begin",
    "join",
    "make_directories",
    "make_root",
    "publish",
    "remove",
    "sweep",
    "unmake",
]


def begin(fs: FileSystem, staging: S) -> S:
    """Make the private (0700), locked staging directory of a new checkpoint; returns `staging`, which now says where.
    Raises TagExistsError: as `check_final`. UnsafePathError: the tag is malformed. WriteError: it cannot be made."""
    root, tag = staging.root, check_tag(staging.tag)
    with as_write_error(
        fs, f"no staging directory for tag {tag!r} can be made, nothing was written", staging.final_path
    ):
        check_final(fs, staging, step="create")
        path = make_private(fs, root, tag)
        try:
            if fs.findings.replaces:
                _check_no_other_writer(fs, root, tag)
            found = fs.stat(path)
            staging.identity, staging.begun_ns = found.identity, found.mtime_ns
            staging.lock = lock_or_none(fs, path)
        except OSError:
            fs.rmdir(path)
            raise
    staging.location.set_result(path)
    return staging


def _check_no_other_writer(fs: FileSystem, root: str, tag: str) -> None:
    """Where a rename replaces what it should refuse: whoever makes a staging directory and then sees another gives
    way."""
    for name in fs.listdir(root):
        other = parse_private_name(name)
        if other is None or (other.kind, other.tag) != ("staging", tag) or other.owner == fs.owner():
            continue
        if fs.owner_state(other.owner) is not OwnerState.DEAD:
            raise TagExistsError(
                f"another process has tag {tag!r} open ({name!r}), and this file system could not keep one from "
                "replacing the other's: use another tag, or delete that directory if its process is gone. Nothing was "
                "written",
                step="create",
                path=root,
            )


def join(fs: FileSystem, root: str, tag: str, name: str) -> str:
    """The path of another rank's staging directory, by its name; this side never publishes, removes or locks it. Raises
    UnsafePathError: that is no such name. CheckpointNotFoundError: it is not there (any more)."""
    parsed = parse_private_name(name)
    if parsed is None or parsed.kind != "staging" or parsed.tag != tag:
        raise UnsafePathError(f"{name!a} is not a staging directory of tag {tag!r}")
    path = os.path.join(os.path.abspath(root), name)
    if fs.stat(path).kind != "dir":
        raise CheckpointNotFoundError(f"staging directory {path!r} is not there; does every rank see the same root?")
    return path


def make_directories(fs: FileSystem, location: str, directories: Iterable[str]) -> None:
    """Make sub-directories ("a/b") of a staging directory; being there already is fine. Raises UnsafePathError: a path
    is malformed. WriteError: one cannot be made."""
    for directory in directories:
        path = os.path.join(location, *check_relative_path(directory))
        with as_write_error(fs, f"directory {directory!r} cannot be made in the staging directory", path):
            fs.makedirs(path)


def publish(fs: FileSystem, staging: Staging, manifest: Manifest) -> Manifest:
    """Make the staged files durable, then visible under the tag, in the order given in the module docstring.

    Every file must be complete and synced. When this returns, the checkpoint survives power loss. With "replace"
    the old checkpoint is deleted after that; if the deletion fails, it is left for later sweeps.
    The manifest is returned as it is written, with what is known of its writer and timing.

    Raises:
        TagExistsError: the tag was committed in the meantime; it was left as it is.
        CommitError: `step` names what failed; `committed` is None if it is not known whether the tag is visible.
        UnsupportedStateError: metadata that is not JSON.
    """
    with staging.turn:
        if staging.state not in (State.OPEN, State.SEALED):
            raise TransactionStateError(f"tag {staging.tag!r} is {staging.state.value}: it cannot be committed")
        staging.state = State.SEALED
        manifest = replace(manifest, writer={**_written_by(), **manifest.writer}, timing=staging.timing)
        raw = encode(manifest)
        with _step("manifest", staging):
            create_file(fs, staging, MANIFEST_NAME, raw)
            folders = _check_contents(fs, staging, manifest, len(raw))
        with _step("sync", staging):
            _open_to_readers(fs, staging)
            for folder in folders:
                fs.fsync_dir(folder)
        staging.state = State.DURABLE
        replaced = _make_visible(fs, staging)
        staging.state = State.COMMITTED
        if staging.lock is not None:
            staging.lock.close()
    for old_path in replaced:
        try:
            move_additions(fs, staging, old_path)
            remove_tree(fs, old_path)
        except OSError as error:
            level, left = logging.WARNING, old_path
            with contextlib.suppress(OSError):
                # Under this name, a sweep by this process finds it.
                left = make_private(fs, staging.root, staging.tag, "trash", old_path)
                level = logging.INFO
            report(level, "tag %r is committed; the tree it replaced is at %r and stays: %s", staging.tag, left, error)
    return manifest


def _written_by() -> dict[str, str]:
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


def _make_visible(fs: FileSystem, staging: Staging) -> list[str]:
    """Returns where the replaced trees are now."""
    with _step("rename", staging):
        if staging.given_up:
            raise CommitError(
                f"tag {staging.tag!r} was given up while it was being committed; nothing was renamed", step="rename"
            )
        try:
            replaced = rename_to_final(fs, staging)
        except OSError:
            # Network file systems may report the failure of a rename that they did.
            staging.renamed = fs.stat(staging.final_path).identity == staging.identity
            raise
    staging.renamed = True
    with _step("sync root", staging):
        fs.fsync_dir(staging.root)
    return replaced


def abort(fs: FileSystem, staging: Staging) -> None:
    """Delete a staging directory that will not be published, freeing its space. Does nothing after the rename.

    Waits for a publish that runs on another thread, which then ends before its rename if it has not made it yet. Raises
    WriteError: it could not be deleted; it stays private and is swept once this process is gone.
    """
    staging.given_up = True
    with staging.turn, contextlib.ExitStack() as at_end:
        if staging.state in (State.COMMITTED, State.ABORTED):
            return
        staging.state = State.ABORTED
        if staging.lock is not None:
            at_end.callback(staging.lock.close)
        what = "the staging directory could not be deleted; it is left for a later sweep"
        with as_write_error(fs, what, staging.path):
            # A rename that reported failure may have happened: only a directory that is still ours is deleted.
            if not staging.renamed and fs.stat(staging.path).identity == staging.identity:
                remove_tree(fs, staging.path)


@contextlib.contextmanager
def _step(step: str, staging: Staging) -> Iterator[None]:
    """Turn an OSError into a CommitError that names the step and says what is on disk; tell who watches the steps,
    whether this one succeeds or fails."""
    start_s = time.perf_counter()
    try:
        yield
    except OSError as error:
        if staging.renamed:
            raise CommitError(
                f"the checkpoint is at {staging.final_path!r} now, but the last step failed: whether it survives power "
                f"loss is unknown; nothing was deleted ({error})",
                step=step,
                errno=error.errno,
                path=staging.root,
                committed=None,
            ) from error
        if isinstance(error, (CommitError, OutOfSpaceError)):
            raise
        raise CommitError(
            f"{error}; tag {staging.tag!r} was not committed, what was there before is unchanged",
            step=step,
            errno=error.errno,
            path=error.filename if isinstance(error.filename, str) else staging.path,
        ) from error
    finally:
        if staging.on_step is not None:
            staging.on_step(step, start_s)


def _check_contents(fs: FileSystem, staging: Staging, manifest: Manifest, manifest_bytes: int) -> list[str]:
    """The directories of the staging tree, deepest first, once it holds exactly the manifest's files."""
    expected = {entry.path: entry.size_bytes for entry in manifest.files} | {MANIFEST_NAME: manifest_bytes}
    folders = [staging.path]
    for inner, found in tree_of(fs, staging.path):
        if found.kind == "dir":
            folders.append(os.path.join(staging.path, inner))
        elif found.kind != "file" or expected.pop(inner, None) != found.size_bytes:
            refuse(staging, f"{inner!r} in the staging directory is not the file that was written")
    if expected:
        refuse(staging, f"{min(expected)!r} has vanished from the staging directory")
    return folders[::-1]


def _open_to_readers(fs: FileSystem, staging: Staging) -> None:
    """Give the private directory the mode a new one would have; the manifest's mode tells the umask without a race."""
    file_bits = fs.stat(os.path.join(staging.path, MANIFEST_NAME)).mode & 0o666
    # Who may read a directory may search it. The set-group-id bit, which a directory inherits from its root, stays.
    now = fs.stat(staging.path).mode
    mode = now & 0o2000 | 0o700 | file_bits | (file_bits & 0o444) >> 2
    try:
        if mode != now:
            fs.chmod(staging.path, mode)
    except OSError as error:
        if error.errno not in REFUSED - {errno.EPERM}:
            raise
