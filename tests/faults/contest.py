"""Two processes at work on the same tags, one killed. ``python -m tests.faults.contest --full``

At the i-th file call of one engine the other runs its whole job, or as much of it as it can without waiting for the
first; then either of them is killed at some later call of its own, or none. All pairs of calls are tried, through the
seam. What either has reported is there afterwards, before anything is swept.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from async_ckpt import CheckpointNotFoundError, KeepLast
from async_ckpt.storage import transaction
from tests.support.faulty_filesystem import Killed, Operation
from tests.support.insides import commits_of
from tests.support.making import private_names

from .oracle import Contents, contents
from .report import ALL, Extent, Row, command, extent_of
from .workloads import TIMEOUT_S, Folder, Job, Told, faulty_filesystem, make_engine, quiet

Victim = str  # "first", "second" or "nobody"


@dataclass(frozen=True)
class Side:
    """One process: its engine's configuration, and what it does with it."""

    config: dict[str, Any]
    work: Callable[[Job], None]


@dataclass(frozen=True)
class Contest:
    """Two sides, and what may be there in the end; the tags at the start are "oldest" (1) and "older" (2)."""

    name: str
    first: Side
    second: Side
    check: Callable[[Contents, Told], None]
    in_two_renames: bool = False
    """Whether the file system refuses to exchange two names."""
    has_locks: bool = True
    """False: every lock is granted to everybody, to show that this sweep would see it."""


def _remove(job: Job) -> None:
    with contextlib.suppress(CheckpointNotFoundError):
        transaction.remove(commits_of(job.engine).filesystem, job.engine.root, "oldest")
        job.told.committed.pop("oldest", None)


def _reported(found: Contents, told: Told) -> None:
    for tag, version in told.committed.items():
        if version >= 10:
            assert tag in found, f"{tag!r}, reported as committed in version {version}, is gone"
            attempted = told.attempted[tag]
            assert found[tag] in attempted and found[tag] >= 10, f"{tag!r} went back to version {found[tag]}"


def _with_retention(found: Contents, told: Told) -> None:
    """Of the start's tags "oldest" makes way for "new", and "older" only for both "new" and the replaced "oldest"."""
    _reported(found, told)
    assert "oldest" in found or "new" in found, found
    assert "older" in found or ("new" in found and found.get("oldest") == 50), found


def _with_replacements(found: Contents, told: Told) -> None:
    _reported(found, told)
    assert {"oldest", "older"} <= set(found), found


def _with_removal(found: Contents, told: Told) -> None:
    # Deleted by name, whatever version that was.
    assert found.get("oldest") in (None, 1, 50) and "older" in found, found


RETAINING = Side({"retention": KeepLast(2)}, lambda job: job.whole("new", 10))
REPLACING = Side({"overwrite": "replace"}, lambda job: job.whole("oldest", 50))
REPLACING_TOO = Side({"overwrite": "replace"}, lambda job: job.whole("oldest", 51))
REMOVING = Side({}, _remove)

CONTESTS = (
    Contest("retention, replaced inside", RETAINING, REPLACING, _with_retention),
    Contest("replace, retention inside", REPLACING, RETAINING, _with_retention),
    Contest("replace, replaced inside", REPLACING, REPLACING_TOO, _with_replacements),
    Contest("deletion, replaced inside", REMOVING, REPLACING, _with_removal),
    Contest("replace, deleted inside", REPLACING, REMOVING, _with_removal),
    Contest(
        "retention twice", RETAINING, Side({"retention": KeepLast(2)}, lambda job: job.whole("new-b", 11)), _reported
    ),
    Contest("retention, replaced inside by two renames", RETAINING, REPLACING, _with_retention, True),
    Contest("replace by two renames, retention inside", REPLACING, RETAINING, _with_retention, True),
)


class _Player:
    """One side on a root, with a file system of its own that may be killed."""

    def __init__(self, root: Path, side: Side, told: Told, contest: Contest) -> None:
        self.fs = faulty_filesystem()
        self.fs.refuse_exchange = contest.in_two_renames
        self.side = side
        self.engine = make_engine(root, self.fs, num_writers=1, sweep_on_start=False, **side.config)
        self.job = Job(self.engine, told)
        self.start = self.fs.num_counted
        self.stands = threading.Event()
        """Ended, dead, or waiting for the other's claim."""
        self._flock = self.fs.flock if contest.has_locks else lambda fd: True
        self.fs.flock = self._try_lock  # type: ignore[method-assign]

    @property
    def num_calls(self) -> int:
        return self.fs.num_counted - self.start

    def _try_lock(self, fd: int) -> bool:
        held = self._flock(fd)
        if not held:
            self.stands.set()
        return held

    def play(self) -> None:
        with contextlib.suppress(Exception, Killed):
            self.side.work(self.job)
        self.stands.set()

    def leave(self) -> None:
        with contextlib.suppress(Exception, Killed):
            self.engine.close()
        self.fs.dispose()


def play(root: Path, told: Told, contest: Contest, i: int, victim: Victim, j: int) -> tuple[_Player, _Player]:
    """One game; the second side begins at the first one's call `i`, the victim dies at its call `j` (-1: nobody)."""
    first = _Player(root, contest.first, told, contest)
    second = _Player(root, contest.second, told, contest)
    if j >= 0:
        (first if victim == "first" else second).fs.kill_at(j)
    thread = threading.Thread(target=second.play)
    has_begun = threading.Event()

    def begin(op: Operation) -> None:
        if op.index - first.start >= i >= 0 and not has_begun.is_set():
            has_begun.set()
            thread.start()
            assert second.stands.wait(TIMEOUT_S), "the second side hangs"

    first.fs.before = begin
    with quiet():
        first.play()
        first.fs.before = None
        if first.fs.killed:
            # Dead means that its claims are gone, too.
            first.fs.dispose()
        if has_begun.is_set():
            thread.join(TIMEOUT_S)
            assert not thread.is_alive(), "the second side hangs"
        first.leave()
        second.leave()
    return first, second


def check(root: Path, told: Told, contest: Contest) -> None:
    """Before anything is swept (where one rename replaces), and after it."""
    found = contents(root)
    if not contest.in_two_renames:
        contest.check(found, told)
    with make_engine(root) as engine:
        assert private_names(root) == []
        swept = contents(root)
        contest.check(swept, told)
        assert contest.in_two_renames or swept == found, (found, swept)
        Job(engine, Told()).whole("after", 1000)
    assert contents(root) == {**swept, "after": 1000}


def count(folder: Folder, contest: Contest) -> tuple[list[Operation], int]:
    """The first side's calls, and how many the second makes, each on its own."""
    nums = []
    for side in (contest.second, contest.first):
        root, told = folder.root()
        player = _Player(root, side, told, contest)
        with quiet():
            player.play()
            nums.append(player.num_calls)
            player.leave()
        folder.drop(root)
    calls = [op for op in player.fs.operations if op.index >= player.start]
    return calls[: nums[1]], nums[0]


def games(num_first: int, num_second: int) -> Iterator[tuple[int, Victim, int]]:
    for i in range(num_first):
        yield i, "nobody", -1
        yield from ((i, "first", j) for j in range(i, num_first))
        yield from ((i, "second", j) for j in range(num_second))


def play_and_check(root: Path, told: Told, contest: Contest, i: int, victim: Victim, j: int) -> None:
    """One game, and what must hold after it."""
    play(root, told, contest, i, victim, j)
    with quiet():
        check(root, told, contest)


def sweep(
    folder: Folder,
    contest: Contest,
    how: Extent = ALL,
    begins_at: Callable[[Operation], bool] = lambda op: True,
) -> Row:
    """The games of one contest in which the second side begins at such calls."""
    row = Row(contest.name)
    calls, num_second = count(folder, contest)
    row.operations = len(calls) + num_second
    wanted = (game for game in games(len(calls), num_second) if begins_at(calls[game[0]]))
    for (i, victim, j), root, told in folder.each(how.of(wanted)):
        what = f"second at call {i}, {victim} killed at {j}"
        row.check(how, what, play_and_check, root, told, contest, i, victim, j)
    return row


def main(options: argparse.Namespace) -> Iterator[Row]:
    with Folder() as folder:
        for contest in CONTESTS:
            yield sweep(folder, contest, extent_of(options, 60))


if __name__ == "__main__":
    command("Two processes on the same tags, one killed", __doc__, main)
