"""Where a DeepSpeed checkpoint goes, which ranks commit it together, and what else is done there: other files are taken
in, `latest` names it.

Guarantees:
- `latest` is written after the rename, by the rank that renamed, and never goes back to an older save of this engine.
- On every rank a commit succeeds only once `latest` is durable, so that whoever has waited may read it.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed

from ...engine.interface import StrPath, tag_of
from ...errors import CommitError, ConfigError, UnsafePathError, WriteError
from ...format.checksum import crc32
from ...format.manifest import FileEntry, Manifest
from ...format.names import MANIFEST_NAME
from ...host.facts import Node, node_from_env
from ...ranks.coordinator import Coordinator, LocalCoordinator
from ...ranks.rank_coordinator import RankCoordinator
from ...retention import CheckpointInfo, RetentionPolicy
from ...storage import transaction
from ...storage.filesystem import FileSystem
from ...storage.private_dirs import replacing
from ...storage.staged import Destination, Staging
from ...storage.write_error import write_error
from ...threads.locks import Lock
from ..adopting import adopt, read_entries

_LATEST_NAME = "latest"
_MAX_LATEST_BYTES = 4096
_OFFLOADED_NAME = "offloaded_tensors"
_STILL_USED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
# Rank 0 often holds the store: it must not leave before the others have heard how their checkpoints ended.
_LINGER_S = 60.0

# Engines of many ranks are made in the same order on every rank, so the same number means the same engine.
_numbers = itertools.count()


class DeepSpeedCoordinator:
    """Hands each checkpoint to the coordinator of the ranks that save under its tag, whatever its save_dir."""

    def __init__(self, filesystem: FileSystem, timeout_s: float, *, node_local: bool) -> None:
        """Rank and store come from the default process group; without one this is a single process. Raises ConfigError:
        `node_local`, and no launcher's variables tell of the nodes."""
        self.rank, self.world_size = 0, 1
        self._node: Node | None = None
        self._store: Any = None
        self._number = 0
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            self.rank, self.world_size = distributed.get_rank(), distributed.get_world_size()
            self._store, self._number = distributed.distributed_c10d._get_default_store(), next(_numbers)
            self._node = node_from_env(self.rank, self.world_size) if node_local else None
        self.offloaded_name = f"rank{self.rank if self._node is None else self._node.ranks.index(self.rank):02d}"
        """DeepSpeed's name for the folder of this rank's offloaded tensors."""
        self.sweeps = False
        self.known_roots: set[str] = set()
        self.newest: dict[str, int] = {}
        """Which save the `latest` of each save_dir names."""
        self.lock = Lock()
        self._filesystem = filesystem
        self._timeout_s = timeout_s
        self._by_ranks: dict[tuple[int, ...], Coordinator] = {}
        everybody = self._of(tuple(range(self.world_size)))
        self.leads = everybody.leads
        self.talk = everybody.talk if isinstance(everybody, RankCoordinator) else None
        """Asks the other ranks; None for a single process."""

    def bind(self, filesystem: FileSystem, root: str) -> None:
        return

    def begin(self, destination: Destination, overwrite: str) -> Staging:
        return self._for(destination).begin(destination, overwrite)

    def admit(self, staging: Staging, path: str, manifest_bytes: int) -> Future[str]:
        return self._for(staging.destination).admit(staging, path, manifest_bytes)

    def publish(self, staging: Staging, part: Manifest) -> None:
        self._for(staging.destination).publish(staging, part)

    def abort(self, staging: Staging, error: BaseException) -> None:
        self._for(staging.destination).abort(staging, error)

    def sweep(self) -> None:
        # Each save_dir is swept when it is first used.
        self.sweeps = True

    def close(self) -> None:
        for coordinator in self._by_ranks.values():
            coordinator.close()

    def _for(self, destination: Destination) -> Coordinator:
        assert isinstance(destination, DeepSpeedDestination)
        return self._of(destination.ranks)

    def _of(self, ranks: tuple[int, ...]) -> Coordinator:
        """The coordinator of these ranks, this one among them. Raises ConfigError: some ranks, but not all, share a
        tag, and each node has a save_dir of its own."""
        if ranks in self._by_ranks:
            return self._by_ranks[ranks]
        made: Coordinator = LocalCoordinator()
        if len(ranks) > 1:
            is_all = len(ranks) == self.world_size
            if self._node is not None and not is_all:
                raise ConfigError(
                    f"ranks {ranks} save under a tag of their own; with use_node_local_storage all ranks must have the "
                    "same"
                )
            made = RankCoordinator(
                self._store,
                ranks.index(self.rank),
                len(ranks),
                timeout_s=self._timeout_s,
                # Engines are numbered anew in every run, and DeepSpeed's store lives no longer than one.
                run_id=f"deepspeed/{self._number}",
                node=self._node,
                channel="all" if is_all else f"{crc32(repr(ranks).encode()):08x}",
                linger_s=_LINGER_S,
            )
        made.bind(self._filesystem, "")
        return self._by_ranks.setdefault(ranks, made)


@dataclass(frozen=True)
class DeepSpeedDestination(Destination):
    """One checkpoint: the folder `<root>/<tag>`, which DeepSpeed calls `<save_dir>/<full_tag>`.

    DeepSpeed's tags may hold "/": then the root of the checkpoint lies below `save_dir`. `ranks` are those that save
    under this tag, ascending: all of them, unless the training script has given its ranks different tags. `number`
    counts the engine's saves.
    """

    save_dir: str
    full_tag: str
    save_latest: bool
    ranks: tuple[int, ...]
    number: int
    job: DeepSpeedCoordinator
    loads_itself = re.compile(".*")

    @classmethod
    def of(
        cls, info: Any, save_dir: str | None, tags: Sequence[str], number: int, job: DeepSpeedCoordinator
    ) -> DeepSpeedDestination:
        """From a `CheckpointCommitInfo`, or from a bare tag and the engine's own `save_dir`; `tags` are those of all
        ranks. Raises ConfigError: no save_dir is known. UnsafePathError: the tag leaves it, or is the manifest's name.
        """
        given = getattr(info, "save_dir", save_dir)
        if given is None:
            raise ConfigError(
                "a bare tag needs save_dir: give it to AsyncDeepSpeedEngine, or pass a CheckpointCommitInfo"
            )
        base, full_tag = os.path.abspath(os.fspath(given)), tag_of(info)
        folder = os.path.normpath(os.path.join(base, full_tag))
        if not folder.startswith(base.rstrip("/") + "/"):
            raise UnsafePathError(f"tag {full_tag[:200]!a} leaves the save_dir {base!r}; nothing was touched")
        if MANIFEST_NAME in full_tag.casefold().split("/"):
            raise UnsafePathError(
                f"tag {full_tag[:200]!a}: {MANIFEST_NAME!r} is a checkpoint's own; choose another tag"
            )
        root, name = os.path.split(folder)
        ranks = tuple(rank for rank, tag in enumerate(tags) if tag == full_tag)
        return cls(root, name, base, full_tag, bool(getattr(info, "save_latest", True)), ranks, number, job)

    @property
    def folder(self) -> str:
        return os.path.join(self.root, self.tag)

    def inside(self, path: StrPath) -> str | None:
        """`path` relative to the final folder ("" for the folder itself); None where it lies elsewhere."""
        absolute, folder = os.path.abspath(os.fspath(path)), self.folder
        if absolute == folder:
            return ""
        return absolute[len(folder) + 1 :] if absolute.startswith(folder + "/") else None

    def is_for(self, info: Any) -> bool:
        """Whether `info` (or a bare tag) means this checkpoint."""
        given = getattr(info, "save_dir", None)
        return tag_of(info) == self.full_tag and (given is None or os.path.abspath(os.fspath(given)) == self.save_dir)

    def prepare(self, filesystem: FileSystem, *, leads: bool, overwrite: str) -> None:
        """Make and sweep the directory when it is first used; let another tool's checkpoint be replaced as a whole."""
        if self.root not in self.job.known_roots:
            transaction.make_root(filesystem, self.root)
            if leads and self.job.sweeps:
                transaction.sweep(filesystem, self.root)
            self.job.known_roots.add(self.root)
        if leads and overwrite == "replace":
            adopt(filesystem, self.root, self.tag)

    def take_in(self, filesystem: FileSystem, staging: str) -> Sequence[FileEntry]:
        """Move the NVMe-offloaded state, which DeepSpeed copied to the final folder past the engine.

        The emptied folders go too, so that the staging directory can take their name.
        """
        folder, name = self.folder, self.job.offloaded_name
        source = os.path.join(folder, _OFFLOADED_NAME, name)
        if filesystem.stat(source).kind != "dir":
            return ()
        try:
            filesystem.makedirs(os.path.join(staging, _OFFLOADED_NAME))
            filesystem.rename(source, os.path.join(staging, _OFFLOADED_NAME, name))
            for emptied in (os.path.dirname(source), folder):
                try:
                    filesystem.rmdir(emptied)
                except OSError as error:
                    # Other ranks' folders are still there: the last one to move its own removes it.
                    if error.errno not in _STILL_USED:
                        raise
            rank = self.job.rank if self.job.world_size > 1 else None
            return tuple(read_entries(filesystem, staging, f"{_OFFLOADED_NAME}/{name}", rank))
        except OSError as error:
            raise write_error(
                filesystem, error, f"offloaded tensors could not be moved to {staging!r}", source
            ) from error

    def published(self, filesystem: FileSystem) -> None:
        """Make `latest` name it. Of ranks with tags of their own rank 0 does so, as with stock DeepSpeed."""
        if not self.save_latest or (self.job.rank != 0 and len(self.ranks) < self.job.world_size):
            return
        with self.job.lock:
            # Commits may end in another order than they began.
            if self.number >= self.job.newest.get(self.save_dir, 0):
                _write_latest(filesystem, self.save_dir, self.full_tag)
                self.job.newest[self.save_dir] = self.number


def _write_latest(filesystem: FileSystem, save_dir: str, tag: str) -> None:
    """Make `<save_dir>/latest` name `tag`: written beside it, synced, renamed, directory synced. Blocks; any thread.
    Raises CommitError: the checkpoint is committed, but `latest` still names the one before (or, after the rename, it
    is unknown which one survives power loss)."""
    path = os.path.join(save_dir, _LATEST_NAME)
    new = os.path.join(save_dir, f".{_LATEST_NAME}.new")
    try:
        with contextlib.suppress(FileNotFoundError):
            filesystem.unlink(new)
        with replacing(filesystem, path, new):
            filesystem.create_file(new, tag.encode())
    except OSError as error:
        raise CommitError(
            f"checkpoint {tag!r} is committed and whole in {save_dir!r}, but {path!r} could not be made to name "
            f"it: {error}",
            step="latest",
            errno=error.errno,
            path=path,
            committed=None,
        ) from error


class KeepLatest(RetentionPolicy):
    """Keeps what `latest` names, which is not the newest after saves with ``save_latest=False``."""

    def __init__(self, filesystem: FileSystem, save_dir: str) -> None:
        self._filesystem = filesystem
        self._path = os.path.join(save_dir, _LATEST_NAME)

    def kept(self, checkpoints: Sequence[CheckpointInfo], now_unix_ns: int) -> dict[str, str]:
        try:
            named = self._filesystem.read_file(self._path, _MAX_LATEST_BYTES).decode().strip()
        except FileNotFoundError:
            return {}
        return {info.tag: "named by latest" for info in checkpoints if info.tag == named}


def write_beside(filesystem: FileSystem, path: str, state: Any) -> None:
    """`torch.save` to a path that belongs to no checkpoint: durable when it returns, never partly visible. Blocks.
    Raises WriteError: what was at `path` before is still there."""
    folder, name = os.path.split(os.path.abspath(path))
    new = os.path.join(folder, f".{name}.{os.getpid()}.new")
    try:
        with replacing(filesystem, os.path.join(folder, name), new), open(new, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise WriteError(
            f"saving {name!r} failed; what was there before is unchanged", errno=error.errno, path=path
        ) from error
