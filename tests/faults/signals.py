"""SIGTERM and SIGINT at every file call of save, commit and close. ``python -m tests.faults.signals --full``

Real processes send themselves the signal at their k-th file call, from whichever thread makes it, once or twice. After
it the process has ended, in bounded time and with the right exit code; what it had reported is there, each tag is
whole, in its old or its new version; and a new engine works in the same root.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.faulty_filesystem import Operation

from .children import Child, begin_notes
from .oracle import check_recovery, contents
from .report import ALL, Extent, Row, command, extent_of
from .workloads import Folder, Job, Told, faulty_filesystem, make_engine

COMMITS = (("new", 10), ("older", 11), ("new", 12))
LAST = ("last", 99)
"""What the preemption's hook saves."""
PARALLEL = 2


@dataclass(frozen=True)
class Case:
    """A signal, what the process does about it, how it must end; `again`: calls from the first signal to the second."""

    name: str
    signum: int
    handler: str
    exit_codes: tuple[int, ...]
    again: int | None = None


CASES = (
    Case("SIGTERM", signal.SIGTERM, "default", (-signal.SIGTERM,)),
    Case("SIGINT", signal.SIGINT, "KeyboardInterrupt", (1,)),
    Case("SIGINT twice at once", signal.SIGINT, "KeyboardInterrupt", (1,), again=0),
    Case("SIGINT twice", signal.SIGINT, "KeyboardInterrupt", (1,), again=2),
    Case("SIGTERM, a handler that exits", signal.SIGTERM, "exit", (143,)),
    Case("SIGTERM twice, a handler that exits", signal.SIGTERM, "exit", (143,), again=1),
    Case("SIGTERM, on_preemption", signal.SIGTERM, "preemption", (0,)),
    Case("SIGTERM twice, on_preemption", signal.SIGTERM, "preemption", (0,), again=1),
    Case("SIGINT twice, on_preemption", signal.SIGINT, "preemption", (0, 1), again=4),
)


class _Sender:
    """Sends the process its signal at the k-th file call, of any thread; -1: never."""

    def __init__(self, case: Case, k: int) -> None:
        self.num_calls = 0
        self._lock = threading.Lock()
        self._case = case
        self._at = [] if k < 0 else [k] if case.again is None else [k, k + case.again]

    def __call__(self, op: Operation) -> None:
        with self._lock:
            number, self.num_calls = self.num_calls, self.num_calls + 1
        for _ in range(self._at.count(number)):
            os.kill(os.getpid(), self._case.signum)


def _exit(signum: int, frame: Any) -> None:
    raise SystemExit(128 + signum)


def job(root: Path, case: Case, k: int) -> None:
    """The process: notes what was committed, and at the end how many calls it made."""
    note = begin_notes(root)
    told = Told(on_commit=lambda tag, version: note(f"{tag} {version}"))
    fs = faulty_filesystem()
    sender = _Sender(case, k)
    if case.handler == "exit":
        signal.signal(case.signum, _exit)
    with make_engine(root, fs, overwrite="replace", close_timeout_s=30.0) as engine:
        work = Job(engine, told)
        if case.handler == "preemption":
            engine.on_preemption((case.signum,), save=lambda: work.whole(*LAST), deadline_s=30.0)
        fs.before = sender
        for tag, version in COMMITS:
            work.whole(tag, version, ("model.pt", "sub/optim.pt"))
            if engine.poll_preemption():
                break
    note(f"calls={sender.num_calls}")


def start(root: Path, told: Told, case: Case, k: int) -> Child:
    return Child(root, told, (*COMMITS, LAST), job, case, k)


def num_calls(notes: list[str]) -> int:
    """The calls that a process has made; -1 when it did not get that far."""
    return next((int(line.removeprefix("calls=")) for line in notes if line.startswith("calls=")), -1)


def check(root: Path, told: Told, case: Case, child: Child) -> None:
    is_whole = num_calls(child.notes()) >= 0
    # A signal after the last call that was counted before changes nothing.
    has_ended_well = child.exit_code == 0 and is_whole
    assert child.exit_code in case.exit_codes or has_ended_well, (child.exit_code, child.errors())
    if has_ended_well and case.handler == "preemption":
        found = contents(root)
        assert all(found.get(tag) == version for tag, version in told.committed.items() if tag == "last"), found
    check_recovery(root, told)


def count(folder: Folder, case: Case) -> int:
    """How many file calls the job makes."""
    root, told = folder.root()
    child = start(root, told, case, -1)
    num = num_calls(child.notes())
    assert child.exit_code == 0 and num > 0, child.errors()
    folder.drop(root)
    return num


def sweep(folder: Folder, case: Case, how: Extent = ALL) -> Row:
    """The signal at every call."""
    row = Row(case.name)
    row.operations = count(folder, case)
    chosen = how.of(range(row.operations))
    for at in range(0, len(chosen), PARALLEL):
        games = []
        for k in chosen[at : at + PARALLEL]:
            root, told = folder.root()
            games.append((k, root, told, start(root, told, case, k)))
        for k, root, told, child in games:
            row.check(how, f"{case.name} at call {k}", check, root, told, case, child)
            child.close()
            folder.drop(root)
    return row


def main(options: argparse.Namespace) -> Iterator[Row]:
    with Folder() as folder:
        for case in CASES:
            yield sweep(folder, case, extent_of(options, 12))


if __name__ == "__main__":
    # Seen by the fork server: its children need no more than one thread for their sums.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command("SIGTERM and SIGINT at every file call", __doc__, main)
