"""Several real processes on one root, and readers beside them. ``python -m tests.faults.crowd --full``

Each process commits the same tags with content of its own, and replaces and deletes others; of those that refuse to
overwrite, exactly one wins. Some are killed, some stopped for a while as new ones start. Readers loop over `latest`,
`verify` and `load` and must only ever see whole checkpoints of one writer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from async_ckpt import Catalog, CheckpointNotFoundError
from async_ckpt.reading.load import load_committed
from tests.support.making import private_names
from tests.support.processes import Talking

from .oracle import contents
from .report import Row, command, extent_of
from .workloads import Folder, make_engine, version_of

WRITER = """
import errno, json, sys
from pathlib import Path
from async_ckpt import CheckpointNotFoundError, CommitError, TagExistsError
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from tests.faults.workloads import Job, Told, make_engine
root, me, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
outcomes = {"won": [], "refused": 0, "replaced": 0, "deleted": 0}
print("ready", flush=True)
sys.stdin.readline()
with make_engine(root) as refusing, make_engine(root, overwrite="replace", sweep_on_start=False) as replacing:
    for k in range(rounds):
        version = 1000 * (k + 1) + me
        try:
            Job(refusing, Told()).whole(f"once-{k}", version, ("model.pt", "sub/optim.pt"))
            outcomes["won"].append(k)
        except TagExistsError:
            outcomes["refused"] += 1
            refusing._commits.raise_unacknowledged()
        try:
            Job(replacing, Told()).whole("again", version, ("model.pt", "sub/optim.pt"))
            outcomes["replaced"] += 1
        except CommitError as error:
            # Another process was stopped in the very moment in which it held the name.
            if error.errno != errno.EBUSY:
                raise
        Job(replacing, Told()).whole(f"gone-{me}", version)
        try:
            transaction.remove(FileSystem(), str(root), f"gone-{me}")
            outcomes["deleted"] += 1
        except CheckpointNotFoundError:
            pass
        print(k, flush=True)
print(json.dumps(outcomes), flush=True)
"""


def read_once(root: Path) -> int:
    """Look at everything there is once; returns how many checkpoints were loaded."""
    catalog, num = Catalog(root), 0
    for tag in [*catalog.tags(), catalog.latest()]:
        if tag is None:
            continue
        try:
            report = catalog.verify(tag)
            assert report.ok, report.problems
            assert version_of(load_committed(catalog, tag, "model.pt"), "model.pt") > 0
            num += 1
        except CheckpointNotFoundError:
            # Deleted or replaced once more in between: a clean answer.
            continue
    return num


def crowd(root: Path, num_writers: int, rounds: int, *, kill: bool = False, stop: bool = False) -> Row:
    """One crowd; raises AssertionError."""
    fate = ", one killed" if kill else ", one stopped" if stop else ""
    row = Row(f"{num_writers} writers, {rounds} rounds{fate}")
    writers = [Talking(WRITER, root, number, rounds) for number in range(1, num_writers + 1)]
    assert [writer.hear() for writer in writers] == ["ready"] * num_writers
    for writer in writers:
        writer.say("go")
    first = writers[0]
    first.hear()
    if kill:
        first.kill()
        row.injected += 1
    if stop:
        first.send_signal(signal.SIGSTOP)
        # The signal was sent; the process has stopped when this returns.
        os.waitpid(first.pid, os.WUNTRACED)
        staged = set(private_names(root))
        # A new engine sweeps while the stopped one's staging is there.
        with make_engine(root):
            alive = f"-{first.pid}-"
            mine = {name for name in staged if alive in name and ".staging." in name}
            assert mine <= set(private_names(root)), "the staging of a live process was swept"
        row.injected += 1
    num_read = 0
    rest = writers[1:] if kill or stop else writers
    while any(writer.poll() is None for writer in rest):
        num_read += read_once(root)
    if stop:
        first.send_signal(signal.SIGCONT)
    outcomes: list[dict[str, Any]] = []
    for writer in writers:
        with writer:
            lines = writer.hear_out()
        if writer is first and kill:
            continue
        assert writer.returncode == 0
        outcomes.append(json.loads(lines[-1]))
    for k in range(rounds):
        winners = sum(k in outcome["won"] for outcome in outcomes)
        assert winners == 1 or (kill and winners == 0), f"{winners} winners of once-{k}"
    row.operations = num_read + sum(len(o["won"]) + o["refused"] + o["replaced"] + o["deleted"] for o in outcomes)
    row.injected += row.operations
    with make_engine(root):
        assert private_names(root) == []
    found = contents(root)
    assert {f"once-{k}" for k in range(rounds)} <= set(found)
    row.survived = row.injected
    return row


def main(options: argparse.Namespace) -> Iterator[Row]:
    with Folder() as folder:
        sizes = ((2, 200), (4, 100), (8, 50)) if options.full else ((2, 20), (4, 10))
        cases = list(itertools.product(sizes, ((False, False), (True, False), (False, True))))
        for (num_writers, rounds), (kill, stop) in extent_of(options).of(cases):
            root, _ = folder.root()
            yield crowd(root, num_writers, rounds, kill=kill, stop=stop)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command("Crowds of processes on one root", __doc__, main)
