"""An error at every file operation of whole engines. ``python -m tests.faults.errors --full``

Each call fails once, or for good until it is healed, with each errno. After it: the pending commit says what failed and
where (class, errno, path, what is on disk), all staging memory is back, what was committed verifies, and the same
engine commits again once the fault is gone. Short writes must not matter at all.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import errno
import itertools
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from async_ckpt import CheckpointError, CommitError, OutOfSpaceError, TornSnapshotError, WriteError
from tests.support.faulty_filesystem import FaultyFileSystem, Operation
from tests.support.insides import arena_of, pipeline_of
from tests.support.making import private_names

from .oracle import check_legal, contents
from .report import ALL, Extent, Row, command, extent_of
from .workloads import TIMEOUT_S, WORKLOADS, Folder, Job, Told, Workload, faulty_filesystem, quiet

CODES = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.EINTR)
FULL = (errno.ENOSPC, errno.EDQUOT)
HARMLESS = {"unlink", "rmdir", "close", "flock", "clone", "link"}
"""What may fail after the last sync, or on a descriptor that was only read through, without losing anything; and what
cannot be shared, which then is written."""


class Outcome:
    """What one failing run has shown, and the promises it is held to."""

    def __init__(self, root: Path, told: Told, workload: Workload, fs: FaultyFileSystem, code: int) -> None:
        self.root, self.told, self.workload, self.fs, self.code = root, told, workload, fs, code
        self.errors: list[BaseException] = []
        self._for_sync: set[int] = set()
        self._deleting: set[int] = set()
        fs.before = self._note

    def _note(self, op: Operation) -> None:
        """To open an older checkpoint may fail unseen, a directory to be synced not; deletions are retried."""
        frame = sys._getframe() if op.name in ("open", "rename", "fsync") else None
        while frame is not None:
            if frame.f_code.co_name == "fsync_dir":
                self._for_sync.add(op.index)
            if frame.f_code.co_name == "apply":
                self._deleting.add(op.index)
            frame = frame.f_back

    def _may_fail_unseen(self, op: Operation) -> bool:
        if op.index in self._deleting or ".trash." in (op.dst or ""):
            return True
        if op.name == "open":
            return op.index not in self._for_sync
        # What is given up anyway has nobody to tell; a write that was interrupted is resumed.
        return op.name in HARMLESS or ".staging.gone." in op.path or (op.name, self.code) == ("pwrite", errno.EINTR)

    def run(self, num_writers: int, k: int, *, sticky: bool) -> None:
        """The workload, whose k-th call fails, then one more commit on the same engine without the fault."""
        with quiet():
            engine = self.workload.engine(self.root, self.fs, num_writers)
            try:
                self.fs.fail_at(k, self.code, sticky=sticky)
                self._work(Job(engine, self.told))
                self.fs.heal()
                # Whatever nobody has asked for yet is raised by `create`, once each.
                self.errors += Job(engine, self.told).give_up()
                for version, tag in enumerate(("new", "older", "later"), 500):
                    if self.workload.config.get("overwrite") == "replace" or tag not in engine.tags():
                        Job(engine, self.told).whole(tag, version)
                concurrent.futures.wait(pipeline_of(engine).warming, TIMEOUT_S)
                assert arena_of(engine).num_taken == 0, "staging memory was not given back"
            finally:
                self.fs.heal()
                engine.close()

    def _work(self, job: Job) -> None:
        """Go on with the workload's other commits after a failure, as a training loop that catches would."""
        try:
            self.workload.run(job)
        except Exception as error:  # noqa: BLE001 - judged below
            self.errors.append(error)
        for pending in job.engine.pending():
            pending.exception(TIMEOUT_S)

    def check(self) -> None:
        failed = [op for op in self.fs.operations if op.outcome == errno.errorcode[self.code] and op.index >= 0]
        for error in self.errors:
            self._check_error(error, failed)
        if not self.errors:
            silent = [op for op in failed if not self._may_fail_unseen(op)]
            assert not silent, f"nobody was told of {silent[0].name} {silent[0].path}"
        check_legal(contents(self.root), self.told, self.workload.keeps)
        left = private_names(self.root)
        assert not left or any(op.name in HARMLESS | {"open", "fsync", "rename", "exchange"} for op in failed), left

    def _check_error(self, error: BaseException, failed: list[Operation]) -> None:
        if not isinstance(error, CheckpointError):
            raise AssertionError(f"not of our tree: {error!r}") from error
        assert not isinstance(error, TornSnapshotError)
        if not isinstance(error, OSError):
            return
        assert error.errno == self.code, f"errno {error.errno} of {error!r}"
        assert isinstance(error, (WriteError, CommitError)), repr(error)
        assert error.path is not None and error.path.startswith(str(self.root)), error.path
        assert isinstance(error.__cause__, OSError) and error.__cause__.errno == self.code, "the cause is lost"
        if self.code in FULL and isinstance(error, WriteError):
            assert isinstance(error, OutOfSpaceError) and error.free_bytes is not None, repr(error)
        if isinstance(error, WriteError) and [op.name for op in failed] == ["pwrite"]:
            assert error.offset is not None
        text = str(error)
        assert any(
            word in text for word in ("not committed", "nothing was", "unknown", "cannot be", "left", "deleting")
        ), text


def run_one(
    root: Path, told: Told, workload: Workload, k: int, code: int, *, num_writers: int, direct: bool, sticky: bool
) -> None:
    """The k-th call after the engine was made fails."""
    fs = faulty_filesystem(direct=direct)
    outcome = Outcome(root, told, workload, fs, code)
    outcome.run(num_writers, k, sticky=sticky)
    fs.dispose()
    outcome.check()


def count(folder: Folder, workload: Workload, num_writers: int, direct: bool) -> int:
    """How many calls the workload makes after the engine was made."""
    root, told = folder.root()
    fs = faulty_filesystem(direct=direct)
    with workload.engine(root, fs, num_writers) as engine:
        before = fs.num_counted
        workload.run(Job(engine, told))
        after = fs.num_counted
    folder.drop(root)
    return after - before


def sweep(
    folder: Folder,
    name: str,
    how: Extent = ALL,
    *,
    num_writers: int,
    direct: bool,
    sticky: bool,
) -> Row:
    """Each call of one workload, each errno."""
    workload = WORKLOADS[name]
    row = Row(f"{name}, {num_writers} writers{', direct' if direct else ''}{', until healed' if sticky else ''}")
    row.operations = count(folder, workload, num_writers, direct)
    # A call that is interrupted for ever is retried for ever, in every program.
    codes = [code for code in CODES if not sticky or code != errno.EINTR]
    one = partial(run_one, num_writers=num_writers, direct=direct, sticky=sticky)
    for (k, code), root, told in folder.each(how.of(itertools.product(range(row.operations), codes))):
        row.check(how, f"{errno.errorcode[code]} at call {k}", one, root, told, workload, k, code)
    return row


def _run_whole(root: Path, told: Told, fs: FaultyFileSystem, workload: Workload) -> None:
    workload.live(root, told, fs)
    check_legal(contents(root), told)
    assert private_names(root) == []


def sweep_short_writes(folder: Folder, how: Extent = ALL, *, rounds: int = 4) -> Row:
    """Every write is cut short, with O_DIRECT's alignment and without: nothing fails, nothing differs."""
    row = Row("short writes")
    for number, (name, direct) in enumerate(itertools.product(("one file", "several files", "replace"), (False, True))):
        for length, root, told in folder.each((1, 100, 4096, 4097, 10_000)[: rounds + 1]):
            fs = faulty_filesystem(direct=direct)
            chance = random.Random(how.seed + number)
            # One byte at a time for a while only: else 24 KB take 24,000 calls.
            fs.short_writes = lambda op, length=length, chance=chance: (
                length if length >= 4096 or chance.random() < 0.1 else 1 << 20
            )
            what = f"{name}, writes of {length}{', direct' if direct else ''}"
            row.check(how, what, _run_whole, root, told, fs, WORKLOADS[name])
            row.operations += sum(op.name == "pwrite" for op in fs.operations)
            fs.dispose()
    return row


def main(options: argparse.Namespace) -> Iterator[Row]:
    with Folder() as folder:
        for name, (num_writers, direct, sticky) in itertools.product(
            WORKLOADS, ((1, False, False), (2, True, True), (4, True, False))
        ):
            yield sweep(folder, name, extent_of(options, 20), num_writers=num_writers, direct=direct, sticky=sticky)
        yield sweep_short_writes(folder, extent_of(options))


if __name__ == "__main__":
    command("An error at every file operation", __doc__, main)
