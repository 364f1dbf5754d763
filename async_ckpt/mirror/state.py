"""What is uploaded, kept durably in the root: one small file per tag, mirror and rank, below ``<root>/.mirrors``.

Each is replaced whole (temporary, fsync, rename, fsync of the directory), so that a crash leaves the old text or the
new one. A file that cannot be read counts as absent: the store is asked again then, and nothing is lost but time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..errors import CorruptCheckpointError, report
from ..format.names import check_tag
from ..host.process import Owner, OwnerState
from ..storage.filesystem import FileSystem
from ..storage.write_error import write_error
from ..threads.locks import Lock

DIRECTORY = ".mirrors"
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
    url: str = ""
    """The mirror, for people and for `async-ckpt list`."""
    doomed: tuple[str, ...] = ()
    """Objects that no manifest names any more and that are still to be deleted."""


class States:
    """The states of one mirror, held in memory and on disk. Any thread; writes block.

    Raises:
        WriteError: the directory cannot be made or read.
    """

    def __init__(self, filesystem: FileSystem, root: str, url: str, rank: int) -> None:
        self._fs = filesystem
        self._root = root
        self._home = os.path.join(root, DIRECTORY)
        self._folder = os.path.join(self._home, hashlib.sha256(url.encode()).hexdigest()[:16])
        self._url = url
        self._suffix = f".{rank}.json"
        self._lock = Lock()
        try:
            self._states = self._load()
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

    def write(self, state: TagState) -> None:
        """Make `state` durable.

        Raises:
            WriteError, OutOfSpaceError: it could not be; the old state stays.
        """
        path = os.path.join(self._folder, state.tag + self._suffix)
        temporary = os.path.join(self._folder, f"{_TEMPORARY}{self._fs.owner()}.{next(_numbers)}")
        try:
            if self._fs.stat(self._folder).kind == "missing":
                self._fs.makedirs(self._folder)
                self._fs.fsync_dir(self._home)
                self._fs.fsync_dir(self._root)
            try:
                self._fs.create_file(temporary, json.dumps(asdict(replace(state, url=self._url))).encode())
                self._fs.rename(temporary, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._fs.unlink(temporary)
                raise
            self._fs.fsync_dir(self._folder)
        except OSError as error:
            raise write_error(
                self._fs, error, f"how far the mirroring of {state.tag!r} is cannot be noted", path
            ) from error
        with self._lock:
            self._states[state.tag] = state

    def forget(self, tag: str) -> None:
        """Remove the state of a tag; fine where there is none. Need not be durable: a state that comes back is looked
        into again."""
        with self._lock:
            self._states.pop(tag, None)
        with contextlib.suppress(FileNotFoundError):
            self._fs.unlink(os.path.join(self._folder, tag + self._suffix))

    def _load(self) -> dict[str, TagState]:
        states: dict[str, TagState] = {}
        for name in self._fs.listdir(self._folder) if self._fs.stat(self._folder).kind == "dir" else ():
            path = os.path.join(self._folder, name)
            if name.startswith(_TEMPORARY):
                owner = Owner.parse(name[len(_TEMPORARY) :].rpartition(".")[0])
                if owner is not None and self._fs.owner_state(owner) in (OwnerState.DEAD, OwnerState.REBOOTED):
                    with contextlib.suppress(FileNotFoundError):
                        self._fs.unlink(path)
            elif name.endswith(self._suffix):
                try:
                    states[name[: -len(self._suffix)]] = _read(self._fs, path, self._suffix)
                except FileNotFoundError:
                    # Another process has forgotten it meanwhile.
                    continue
                except CorruptCheckpointError as error:
                    report(logging.WARNING, "%s, and is left out: the store is asked instead", error)
        return states


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


def mirrored_in(filesystem: FileSystem, root: str) -> dict[tuple[str, int], list[str]]:
    """Where each checkpoint of a root has been mirrored: URLs by tag and time of the commit. Reads the states only;
    blocks."""
    found: dict[tuple[str, int], list[str]] = {}
    home = os.path.join(root, DIRECTORY)
    for folder in sorted(filesystem.listdir(home)) if filesystem.stat(home).kind == "dir" else ():
        path = os.path.join(home, folder)
        for name in filesystem.listdir(path) if filesystem.stat(path).kind == "dir" else ():
            if name.endswith(".0.json"):
                with contextlib.suppress(OSError, CorruptCheckpointError):
                    state = _read(filesystem, os.path.join(path, name), ".0.json")
                    if state.mirrored:
                        found.setdefault((state.tag, state.created_unix_ns), []).append(state.url)
    return found
