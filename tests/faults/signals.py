"""SIGTERM and SIGINT at every file call of save, commit and close. ``python -m tests.faults.signals --full``

Real processes send themselves the signal at their k-th file call, from whichever thread makes it, once or twice. After
it the process has ended, in bounded time and with the right exit code; what it had reported is there, each tag is
whole, in its old or its new version; and a new engine works in the same root.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tests.support.faulty_filesystem import Operation

from .oracle import check_recovery, contents
from .report import Row, Sample, command, sample_of, sampled
from .workloads import TIMEOUT_S, Folder, Job, Told, faulty_filesystem, make_engine

COMMITS = (("new", 10), ("older", 11), ("new", 12))
LAST = ("last", 99)
"""What the preemption's hook saves."""
PARALLEL = 2

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "async_ckpt.engine.engine", "tests.faults.workloads"])


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


def job(root: Path, case: Case, k: int, notes: str) -> None:
    """The process: notes what was committed, a line each, and at the end how many calls it made."""
    out = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(os.open(notes + ".err", os.O_WRONLY | os.O_CREAT, 0o600), 2)
    told = Told(on_commit=lambda tag, version: (os.write(out, f"{tag} {version}\n".encode()), None)[1])
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
    os.write(out, f"calls {sender.num_calls}\n".encode())


def start(root: Path, case: Case, k: int) -> BaseProcess:
    process = context.Process(target=job, args=(root, case, k, str(root) + ".notes"))
    process.start()
    return process


def read_notes(root: Path, told: Told) -> int:
    """Put what the process reported into `told`; returns the calls it made, -1 when it did not get that far."""
    num_calls = -1
    for tag, version in (*COMMITS, LAST):
        told.attempt(tag, version)
    notes = Path(str(root) + ".notes")
    for line in notes.read_text().splitlines() if notes.exists() else ():
        name, value = line.split()
        if name == "calls":
            num_calls = int(value)
        else:
            told.commit(name, int(value))
    return num_calls


def check(root: Path, told: Told, case: Case, process: BaseProcess) -> None:
    process.join(2 * TIMEOUT_S)
    errors = Path(str(root) + ".notes.err")
    if process.exitcode is None:
        process.kill()
        process.join()
        raise AssertionError(f"the process hangs: {errors.read_text()[-2000:]}")
    num_calls = read_notes(root, told)
    # A signal after the last call that was counted before changes nothing.
    assert process.exitcode in case.exit_codes or (process.exitcode == 0 and num_calls >= 0), (
        process.exitcode,
        errors.read_text()[-2000:],
    )
    if process.exitcode == 0 and case.handler == "preemption" and num_calls >= 0:
        found = contents(root)
        assert all(found.get(tag) == version for tag, version in told.committed.items() if tag == "last"), found
    check_recovery(root, told)


def count(folder: Folder, case: Case) -> int:
    """How many file calls the job makes."""
    root, told = folder.root()
    process = start(root, case, -1)
    process.join(2 * TIMEOUT_S)
    num_calls = read_notes(root, told)
    assert process.exitcode == 0 and num_calls > 0, Path(str(root) + ".notes.err").read_text()
    folder.drop(root)
    return num_calls


def sweep(folder: Folder, case: Case, *, sample: Sample, seed: int = 1, stop: bool = True) -> Row:
    """The signal at every call (or `sample` of them)."""
    row = Row(case.name)
    row.operations = count(folder, case)
    chosen = list(range(row.operations))
    chosen = sampled(chosen, sample, random.Random(seed))
    for at in range(0, len(chosen), PARALLEL):
        games = []
        for k in chosen[at : at + PARALLEL]:
            root, told = folder.root()
            games.append((k, root, told, start(root, case, k)))
        for k, root, told, process in games:
            row.check(f"{case.name} at call {k}", check, root, told, case, process, stop=stop)
            process.close()
            folder.drop(root)
    return row


def main(options: argparse.Namespace) -> Iterator[Row]:
    with Folder() as folder:
        for case in CASES:
            yield sweep(folder, case, sample=sample_of(options, 12), seed=options.seed, stop=False)


if __name__ == "__main__":
    # Seen by the fork server: its children need no more than one thread for their sums.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command("SIGTERM and SIGINT at every file call", __doc__, main)
