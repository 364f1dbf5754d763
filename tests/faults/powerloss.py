"""Power fails after every file operation of whole engines. ``python -m tests.faults.powerloss --full``

The calls of a run are recorded with their data; for each instant, `diskmodel` says what the disk may hold, and each
such state must hold what was reported as committed until then, and be one that a new engine can go on from. Broken
variants of the file system (a sync left out or moved) run too, and must be caught.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from async_ckpt.format.names import MANIFEST_NAME
from tests.support.faulty_filesystem import FaultyFileSystem, Operation

from .diskmodel import DiskModel, State, write_state
from .oracle import check_sweep
from .report import ALL, Extent, Row, command, extent_of
from .workloads import WORKLOADS, Folder, Told, Workload, faulty_filesystem, quiet


@dataclass
class Recording:
    """A run: its calls, and what had been reported as committed before each."""

    before: Path
    operations: list[Operation]
    told: list[Told]


def record(folder: Folder, workload: Workload, fs: FaultyFileSystem, *, num_writers: int = 2) -> Recording:
    """Run the workload on a file system that keeps what is written; `before` is the root as it was."""
    root, told = folder.root()
    before, _ = folder.root()
    history: list[tuple[int, str, int]] = []
    told.on_commit = lambda tag, version: history.append((len(fs.operations), tag, version))
    with quiet():
        workload.live(root, told, fs, num_writers)
    fs.dispose()
    folder.drop(root)
    attempted = told.attempted
    tellings = []
    for k in range(len(fs.operations) + 1):
        committed = dict(folder.told.committed)
        committed.update({tag: version for at, tag, version in history if at <= k})
        tellings.append(Told(attempted, committed))
    for op in fs.operations:
        # The model has the root as its own.
        op.path = op.path.replace(str(root), str(before), 1)
        op.dst = None if op.dst is None else op.dst.replace(str(root), str(before), 1)
    return Recording(before, fs.operations, tellings)


def check_all(
    folder: Folder,
    recording: Recording,
    row: Row,
    how: Extent,
    *,
    keeps: int | None,
    every: int,
    num_random: int,
) -> None:
    """Cut the power after each `every`-th call; of the states that may be left, equal ones are looked at once."""
    chance = random.Random(how.seed)
    model = DiskModel(recording.before)
    known: set[bytes] = set()
    place = folder.path / "after-power-loss"
    for k, op in enumerate(recording.operations, 1):
        model.apply(op)
        told = recording.told[k]
        is_report = told.committed != recording.told[k - 1].committed
        if not is_report and (op.index < 0 or (k % every and op.name not in ("rename", "exchange"))):
            continue
        row.operations += 1
        for text, state in model.states(chance, num_random):
            key = _digest(state, told)
            if key in known:
                continue
            known.add(key)
            write_state(state, place)
            row.check(how, f"after call {k} ({op.name} {op.path}): {text}", check_sweep, place, told, keeps)
            folder.drop(place)


def _digest(state: State, told: Told) -> bytes:
    digest = hashlib.blake2b(repr(sorted(told.committed.items())).encode())
    for name in sorted(state):
        content = state[name]
        digest.update(name.encode() + (b"/" if content is None else b"=%d" % len(content) + content))
    return digest.digest()


# Broken variants: the test of the test.


class _Broken(FaultyFileSystem):
    """A sync that is left out, moved, or still owed."""

    def __init__(self) -> None:
        super().__init__(keep_data=True)
        self.owes = False


class _NoFileSync(_Broken):
    """Files are never synced; `which` says which."""

    def __init__(self, which: Callable[[str], bool]) -> None:
        super().__init__()
        self._which = which

    def fsync(self, fd: int) -> None:
        if not self._which(self.path_of(fd)):
            super().fsync(fd)


def _is_file(path: str) -> bool:
    return os.path.isfile(path) and not path.endswith(MANIFEST_NAME)


def _is_root(path: str) -> bool:
    return os.path.basename(path).startswith("r")


class _RenameBeforeSync(_Broken):
    """The staging directory is synced under its final name, after the rename."""

    def fsync_dir(self, path: str) -> None:
        if os.path.basename(path).startswith(".staging."):
            self.owes = True
        else:
            super().fsync_dir(path)

    def rename_noreplace(self, src: str, dst: str) -> None:
        super().rename_noreplace(src, dst)
        if self.owes:
            self.owes = False
            super().fsync_dir(dst)


class _SyncBeforeWrite(_Broken):
    """Files are synced as soon as they are made, and not again: the data comes later."""

    def open(self, path: str, flags: int, mode: int = 0o666, *, dir_fd: int | None = None) -> int:
        fd = super().open(path, flags, mode, dir_fd=dir_fd)
        if flags & os.O_CREAT:
            super().fsync(fd)
        return fd

    def fsync(self, fd: int) -> None:
        if os.path.isdir(self.path_of(fd)):
            super().fsync(fd)


class _DeleteBeforeRootSync(_Broken):
    """After an exchange the old tree is deleted first, and the root synced only then."""

    def rename_exchange(self, a: str, b: str) -> None:
        super().rename_exchange(a, b)
        self.owes = True

    def fsync_dir(self, path: str) -> None:
        if not self.owes:
            super().fsync_dir(path)

    def rmdir(self, path: str) -> None:
        super().rmdir(path)
        if self.owes and ".staging." in os.path.basename(path):
            self.owes = False
            super().fsync_dir(os.path.dirname(path))


BROKEN: dict[str, tuple[str, Callable[[], FaultyFileSystem]]] = {
    "no fsync of the files": ("one file", lambda: _NoFileSync(_is_file)),
    "no fsync of the manifest": ("one file", lambda: _NoFileSync(lambda path: path.endswith(MANIFEST_NAME))),
    "no fsync of the staging directory": (
        "one file",
        lambda: _NoFileSync(lambda path: os.path.basename(path).startswith(".staging.")),
    ),
    "no fsync of a sub-directory": (
        "several files",
        lambda: _NoFileSync(lambda path: os.path.basename(path) == "deep"),
    ),
    "no fsync of the root": ("one file", lambda: _NoFileSync(_is_root)),
    "rename before sync": ("one file", _RenameBeforeSync),
    "fsync before the data": ("one file", _SyncBeforeWrite),
    "old tree deleted before the root's fsync": ("replace", _DeleteBeforeRootSync),
    "retention deletes before the root's fsync": ("retention", lambda: _NoFileSync(_is_root)),
}


def sweep(
    folder: Folder,
    name: str,
    how: Extent = ALL,
    *,
    direct: bool,
    num_writers: int,
    every: int = 1,
    num_random: int = 8,
) -> Row:
    """One workload as it is."""
    workload = WORKLOADS[name]
    recording = record(folder, workload, faulty_filesystem(direct=direct, keep_data=True), num_writers=num_writers)
    row = Row(f"{name}, {num_writers} writers{', direct' if direct else ''}")
    check_all(folder, recording, row, how, keeps=workload.keeps, every=every, num_random=num_random)
    return row


def sweep_broken(folder: Folder, name: str, *, every: int = 1, num_random: int = 4, seed: int = 1) -> Row:
    """One broken variant: `survived` counts harmless states, and the rest of the injected ones were caught."""
    workload_name, make = BROKEN[name]
    workload, row = WORKLOADS[workload_name], Row(f"broken: {name}")
    recording, how = record(folder, workload, make()), Extent(seed=seed, stop=False)
    check_all(folder, recording, row, how, keeps=workload.keeps, every=every, num_random=num_random)
    return row


def main(options: argparse.Namespace) -> Iterator[Row]:
    with Folder() as folder:
        every, num_random = (1, 12) if options.full else (3, 3)
        how = extent_of(options)
        modes = ((False, 1), (True, 2), (True, 4))[: None if options.full else 2]
        cases = list(itertools.product(WORKLOADS, modes))
        for name, (direct, num_writers) in how.of(cases):
            yield sweep(folder, name, how, direct=direct, num_writers=num_writers, every=every, num_random=num_random)
        for name in how.of(BROKEN):
            broken = sweep_broken(folder, name, every=every, seed=options.seed)
            verdict = "caught" if broken.lost else "NOT CAUGHT"
            print(f"{broken.name}: {broken.lost} of {broken.injected} states lose data: {verdict}")
            # What counts as lost here is a variant that goes unnoticed.
            yield Row(broken.name, broken.operations, 1, int(broken.lost > 0), int(broken.lost == 0))


if __name__ == "__main__":
    command("Power lost after every file operation", __doc__, main)
