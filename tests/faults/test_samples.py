"""A bounded sample of every sweep that has no file of its own here, and proofs that they see what is broken."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from async_ckpt.format.names import MANIFEST_NAME
from tests.support.faulty_filesystem import Operation

from . import contest, corruption, crash, powerloss, signals, syscalls
from .crowd import crowd
from .report import Extent, Part
from .soak import soak
from .workloads import WORKLOADS, Folder

pytestmark = pytest.mark.wide


@pytest.mark.parametrize("game", contest.CONTESTS, ids=lambda game: game.name)
def test_games_of_two_processes_on_the_same_tags(folder: Folder, game: contest.Contest) -> None:
    row = contest.sweep(folder, game, Extent(15))
    assert row.operations > 30 and row.survived == row.injected == 15


def test_without_locks_a_reported_commit_is_lost(folder: Folder) -> None:
    """Retention moves away what has just replaced the checkpoint it looked at."""

    def moves_away(op: Operation) -> bool:
        return op.name == "rename" and op.path.endswith("/oldest")

    unlocked = dataclasses.replace(contest.CONTESTS[0], has_locks=False)
    row = contest.sweep(folder, unlocked, Extent(stop=False), begins_at=moves_away)
    assert row.lost > 0 and any("is gone" in note for note in row.notes), row
    assert contest.sweep(folder, contest.CONTESTS[0], begins_at=moves_away).lost == 0


@pytest.mark.parametrize("name", [MANIFEST_NAME, "model.pt"])
def test_damage_is_named_and_never_loaded(folder: Folder, name: str) -> None:
    row = corruption.sweep(folder, name, num_flips=150)
    assert row.survived == row.injected == row.operations > 160


@pytest.mark.parametrize("name", WORKLOADS)
def test_killed_at_points_of_every_workload(folder: Folder, name: str) -> None:
    for seed, num_writers in enumerate((1, 2, 4)):
        how = {"num_writers": num_writers, "dirty": num_writers == 2, "direct": num_writers != 1}
        row = crash.sweep(folder, WORKLOADS[name], Extent(10, seed), **how)
        assert row.operations > 30 and row.survived == row.injected >= 5


def test_killed_at_every_point_of_a_replacement(folder: Folder) -> None:
    row = crash.sweep(folder, WORKLOADS["replace"], num_writers=1, dirty=False, direct=False)
    assert row.survived == row.injected >= 100


@pytest.mark.parametrize(
    ("kill", "stop"), [(False, False), (True, False), (False, True)], ids=["all live", "one killed", "one stopped"]
)
def test_processes_on_one_root(folder: Folder, kill: bool, stop: bool) -> None:
    row = crowd(folder.root()[0], 3, 4, kill=kill, stop=stop)
    assert row.survived == row.injected > 20


@pytest.mark.parametrize("name", sorted(WORKLOADS.keys() - {"retention", "given up"}))
def test_every_state_after_power_loss_holds_what_was_reported(folder: Folder, name: str) -> None:
    row = powerloss.sweep(folder, name, direct=True, num_writers=2, every=5, num_random=2)
    assert row.operations >= 8 and row.survived == row.injected >= 10


@pytest.mark.parametrize("name", powerloss.BROKEN)
def test_a_missing_or_misplaced_sync_is_caught(folder: Folder, name: str) -> None:
    assert powerloss.sweep_broken(folder, name, every=4 if "retention" not in name else 12, num_random=2).lost > 0


@pytest.mark.parametrize("case", signals.CASES, ids=lambda case: case.name)
def test_a_signal_at_a_call(folder: Folder, case: signals.Case) -> None:
    row = signals.sweep(folder, case, Extent(4, len(case.name)))
    assert row.operations > 50 and row.survived == row.injected == 4


def test_a_short_soak_leaks_and_loses_nothing(folder: Folder) -> None:
    row = soak(*folder.root(), 120, 1, seed=5)
    assert row.survived == row.injected > 20


@pytest.fixture
def strace() -> None:
    if (reason := syscalls.why_not()) is not None:
        pytest.skip(reason)


ERRNOS = {call: tuple(code for code in codes if code != "SIGKILL") for call, codes in syscalls.FAULTS.items()}


@pytest.mark.parametrize(
    ("call", "codes", "num"),
    [(call, ERRNOS[call], 3) for call in ("pwrite64", "fsync", "renameat2", "openat", "sendto")]
    + [(call, ("SIGKILL",), 2) for call in ("pwrite64", "fsync", "renameat2")],
)
def test_an_errno_or_a_kill_at_a_system_call(
    folder: Folder, strace: None, call: str, codes: tuple[str, ...], num: int
) -> None:
    row = syscalls.sweep(folder, call, codes, Extent(num))
    assert row.operations > 3 and row.survived == row.injected == num


@pytest.mark.parametrize("call", syscalls.OPTIONAL)
def test_a_sandbox_that_refuses_an_optional_call_for_good(strace: None, tmp_path: Path, call: str) -> None:
    with Folder(on_disk=str(tmp_path)) as folder:
        row = syscalls.refuse(folder, call)
        assert row.survived == row.injected == 3
        # Which calls look at a file, and which files are reserved, is up to the C library and the file system.
        assert row.operations >= 3 or call in ("statfs", "statx", "fallocate")


def test_all_parts_together_are_the_whole_sweep() -> None:
    points = list(range(10))
    parts = [Extent(Part(number, 3)).of(points) for number in (1, 2, 3)]
    assert sorted(point for part in parts for point in part) == points
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("text", ["0/3", "4/3", "1/0"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="part"):
        Part.parse(text)
