"""Where an engine's status is published: a per-user runtime directory of this machine, or a directory that several share.

    <runtime>/async-ckpt-<uid>/<hash of the root's real path>/<owner>.<n>.json     every engine, by default
    <directory>/.status.<owner>.<n>.json                                            with `StatusObserver(directory)`

`<runtime>` is the first of $XDG_RUNTIME_DIR, /run/user/<uid>, /dev/shm and the temporary directory that works; readers
look at all of them, because a job and the shell beside it may have different environments.

Guarantees:
- A runtime directory is used, for writing or reading, only if it is a real directory that belongs to that user;
  for writing also only if nobody else may enter it.
- A file is replaced by a rename, never synced, and never followed if it is a link.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Protocol

from ..host.process import Owner
from ..names import status_name

_RUNTIME_NAME = re.compile(r"([0-9a-f-]+)\.[0-9]{1,9}\.json")


class StatusPlace(Protocol):
    """One file that can be replaced and removed. Blocks for a few system calls; one thread at a time."""

    def write(self, data: bytes) -> None:
        """Replace the file. Raises OSError."""

    def remove(self) -> None:
        """Remove it; no error when it is gone already. Raises OSError."""


class SharedPlace:
    """A status file in a directory that exists, for readers on other machines."""

    def __init__(self, folder: str, owner: Owner, number: int) -> None:
        self.path = os.path.join(folder, status_name(owner, number))

    def write(self, data: bytes) -> None:
        """As `StatusPlace`."""
        _replace(self.path, data)

    def remove(self) -> None:
        """As `StatusPlace`."""
        for name in (self.path, self.path + ".new"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(name)


class RuntimePlace:
    """A status file in this user's runtime directory; another one is taken when that vanishes (a logout removes some)."""

    def __init__(self, root: str, owner: Owner, number: int) -> None:
        self._key = root_key(root)
        self._name = f"{owner}.{number}.json"
        self._folder: str | None = None

    def write(self, data: bytes) -> None:
        """As `StatusPlace`."""
        if self._folder is not None:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _replace(os.path.join(self._folder, self._name), data)
                return
        for left in (2, 1, 0):
            self._folder = self._make_folder()
            try:
                _replace(os.path.join(self._folder, self._name), data)
                return
            except FileNotFoundError:
                # Another engine has cleaned up the folder while it was empty.
                if not left:
                    raise

    def remove(self) -> None:
        """As `StatusPlace`."""
        if self._folder is None:
            return
        for name in (self._name, self._name + ".new"):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(os.path.join(self._folder, name))
        remove_folder_if_empty(self._folder)

    def _make_folder(self) -> str:
        uid = os.geteuid()
        problems = []
        for base in _bases(uid):
            home = os.path.join(base, f"async-ckpt-{uid}")
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(home, 0o700)
                found = os.lstat(home)
                if not stat.S_ISDIR(found.st_mode) or found.st_uid != uid or found.st_mode & 0o077:
                    raise PermissionError(errno.EPERM, "it is not a private directory of this user", home)
                folder = os.path.join(home, self._key)
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, 0o700)
                return folder
            except OSError as error:
                problems.append(str(error))
        raise OSError(errno.ENOENT, f"no runtime directory can be used ({'; '.join(problems)})")


def root_key(root: str) -> str:
    """The name of a root's folder in a runtime directory."""
    return hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]


def runtime_homes(uid: int) -> Iterator[str]:
    """The runtime directories of a user that exist, for reading."""
    for base in _bases(uid):
        home = os.path.join(base, f"async-ckpt-{uid}")
        try:
            found = os.lstat(home)
        except OSError:
            # Not there, or in a directory that this user may not enter: nothing can be read from it.
            continue
        if stat.S_ISDIR(found.st_mode) and found.st_uid == uid:
            yield home


def parse_runtime_name(name: str) -> Owner | None:
    """The owner of a status file in a runtime directory; None for every other name."""
    match = _RUNTIME_NAME.fullmatch(name)
    return None if match is None else Owner.parse(match[1])


def remove_folder_if_empty(folder: str) -> None:
    """Remove a root's folder in a runtime directory, unless somebody publishes there. Raises OSError."""
    try:
        os.rmdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
            raise


def _bases(uid: int) -> list[str]:
    given = [os.environ.get("XDG_RUNTIME_DIR", ""), f"/run/user/{uid}", "/dev/shm", os.environ.get("TMPDIR", ""), "/tmp"]
    usable = [os.path.normpath(path) for path in given if os.path.isabs(path) and os.path.isdir(path)]
    return list(dict.fromkeys(usable))


def _replace(path: str, data: bytes) -> None:
    fresh = path + ".new"
    # O_NOFOLLOW and no O_EXCL: a left-over of our own name is overwritten, a planted link is refused.
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
    os.replace(fresh, path)
