"""What is uploaded, kept durably in the root: one small file per tag, mirror and rank, below ``<root>/.mirrors``.

Each is replaced whole (temporary, fsync, rename, fsync of the directory), so that a crash leaves the old text or the
new one. A file that cannot be read counts as absent: the store is asked again then, and nothing is lost but time. A
file beside them says which mirror it is, for the command line.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..errors import CorruptCheckpointError, report
from ..format.names import check_tag
from ..host.process import Owner, OwnerState
from ..storage.filesystem import FileSystem
from ..storage.private_dirs import replacing
from ..storage.write_error import write_error
from ..threads.locks import Lock

DIRECTORY = ".mirrors"
_ABOUT_NAME = "mirror"
_LEADER_SUFFIX = ".0.json"
_MAX_BYTES = 64 << 20
_TEMPORARY = ".tmp."
_numbers = itertools.count()


@dataclass(frozen=True)
class TagState:
    """How far one checkpoint is on its way to one mirror."""

    tag: str
    attempt: str
    created_unix_ns: int
    keys: tuple[str, ...] = ()
    """All data objects that this rank puts, whether they are there yet or not."""
    done: Mapping[str, str] = field(default_factory=dict)
    """Those that were found whole in the store, with their entity tags."""
    mirrored: bool = False
    """The manifest is in the store too. (Retention may have deleted it there since.)"""
    ours: tuple[str, ...] = ()
    """Earlier attempts of this tag that this root has put; they may be replaced."""
    doomed: tuple[str, ...] = ()
    """Objects that no manifest names any more and that are still to be deleted."""


class States:
    """The states of one mirror, held in memory and on disk. Any thread; writes block. Raises WriteError: the directory
    cannot be made or read."""

    def __init__(self, filesystem: FileSystem, root: str, url: str, rank: int) -> None:
        self._fs = filesystem
        self._root = root
        self._home = os.path.join(root, DIRECTORY)
        self._folder = os.path.join(self._home, hashlib.sha256(url.encode()).hexdigest()[:16])
        self._url = url
        self._suffix = f".{rank}.json"
        self._lock = Lock()
        self._states: dict[str, TagState] = {}
        try:
            for name in filesystem.listdir(self._folder) if filesystem.stat(self._folder).kind == "dir" else ():
                if name.startswith(_TEMPORARY):
                    owner = Owner.parse(name[len(_TEMPORARY) :].rpartition(".")[0])
                    if owner is not None and filesystem.owner_state(owner) in (OwnerState.DEAD, OwnerState.REBOOTED):
                        with contextlib.suppress(FileNotFoundError):
                            filesystem.unlink(os.path.join(self._folder, name))
                elif name.endswith(self._suffix):
                    self.reload(name.removesuffix(self._suffix))
        except OSError as error:
            raise write_error(filesystem, error, "the states of a mirror cannot be read", self._folder) from error

    def get(self, tag: str) -> TagState | None:
        """The state of a tag; None where nothing was begun."""
        with self._lock:
            return self._states.get(tag)

    def all(self) -> list[TagState]:
        """All states, in no order."""
        with self._lock:
            return list(self._states.values())

    def is_mirrored(self, tag: str, created_unix_ns: int) -> bool:
        """Whether this very checkpoint has been mirrored."""
        state = self.get(tag)
        return state is not None and state.mirrored and state.created_unix_ns == created_unix_ns

    def begin(self, *, takes_all: bool) -> None:
        """Make it durable that this root has this mirror, whether the store can be reached or not; with `takes_all`,
        that it is to have every checkpoint, from now on. Raises WriteError, OutOfSpaceError: it could not be."""
        known = _described(self._fs, self._folder)
        if known is None or takes_all > known.takes_all:
            text = json.dumps({"url": self._url, "takes_all": takes_all})
            self._replace(_ABOUT_NAME, text.encode(), "that this root has a mirror")

    def write(self, state: TagState) -> None:
        """Make `state` durable. Raises WriteError, OutOfSpaceError: it could not be; the old state stays."""
        what = f"how far the mirroring of {state.tag!r} is"
        self._replace(state.tag + self._suffix, json.dumps(asdict(state)).encode(), what)
        with self._lock:
            self._states[state.tag] = state

    def _replace(self, name: str, data: bytes, what: str) -> None:
        path = os.path.join(self._folder, name)
        temporary = os.path.join(self._folder, f"{_TEMPORARY}{self._fs.owner()}.{next(_numbers)}")
        try:
            if self._fs.stat(self._folder).kind == "missing":
                self._fs.makedirs(self._folder)
                self._fs.fsync_dir(self._home)
                self._fs.fsync_dir(self._root)
            with replacing(self._fs, path, temporary):
                self._fs.create_file(temporary, data)
        except OSError as error:
            raise write_error(self._fs, error, f"{what} cannot be noted", path) from error

    def forget(self, tag: str) -> None:
        """Remove the state of a tag; fine where there is none. Need not be durable: a state that comes back is looked
        into again."""
        with self._lock:
            self._states.pop(tag, None)
        with contextlib.suppress(FileNotFoundError):
            self._fs.unlink(os.path.join(self._folder, tag + self._suffix))

    def reload(self, tag: str) -> None:
        """Take over what another process of this rank has noted about a tag. Raises OSError."""
        state: TagState | None = None
        try:
            state = _read(self._fs, os.path.join(self._folder, tag + self._suffix), self._suffix)
        except FileNotFoundError:
            pass
        except CorruptCheckpointError as error:
            report(logging.WARNING, "%s, and is left out: the store is asked instead", error)
        with self._lock:
            self._states.pop(tag, None)
            self._states.update({tag: state} if state is not None else {})


def _read(filesystem: FileSystem, path: str, suffix: str) -> TagState:
    """Raises CorruptCheckpointError (not what `States.write` writes), OSError."""
    try:
        members: dict[str, Any] = json.loads(filesystem.read_file(path, _MAX_BYTES))
        members |= {name: tuple(map(str, members[name])) for name in ("keys", "ours", "doomed")}
        state = TagState(**members)
        if (type(state.created_unix_ns), type(state.mirrored), type(state.done)) != (int, bool, dict):
            raise ValueError("a member has another type")
        if os.path.join(os.path.dirname(path), check_tag(state.tag) + suffix) != path:
            raise ValueError(f"it is about {state.tag!r}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CorruptCheckpointError(f"the mirror state {path} is damaged ({error})", path=path) from error
    return state


@dataclass(frozen=True)
class Mirrored:
    """What one mirror of a root has had."""

    url: str
    takes_all: bool
    """An engine mirrors there; else only what somebody has asked for by hand."""
    checkpoints: set[tuple[str, int]] = field(default_factory=set)
    """Tags and times of the commits."""


def mirrored_in(filesystem: FileSystem, root: str) -> list[Mirrored]:
    """What of a root has been mirrored, and where. Reads the states only; blocks."""
    found = []
    home = os.path.join(root, DIRECTORY)
    for folder in sorted(filesystem.listdir(home)) if filesystem.stat(home).kind == "dir" else ():
        path = os.path.join(home, folder)
        mirror = _described(filesystem, path)
        for name in filesystem.listdir(path) if mirror is not None else ():
            if name.endswith(_LEADER_SUFFIX):
                with contextlib.suppress(FileNotFoundError, CorruptCheckpointError):
                    state = _read(filesystem, os.path.join(path, name), _LEADER_SUFFIX)
                    if state.mirrored and mirror is not None:
                        mirror.checkpoints.add((state.tag, state.created_unix_ns))
        found += [mirror] if mirror is not None else []
    return found


def _described(filesystem: FileSystem, folder: str) -> Mirrored | None:
    try:
        about = json.loads(filesystem.read_file(os.path.join(folder, _ABOUT_NAME), _MAX_BYTES))
        return Mirrored(str(about["url"]), bool(about["takes_all"]))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError):
        return None
