"""The process dies at every file operation of whole engines. ``python -m tests.faults.crash --full``

Through the file-system seam: at the k-th call the "process" is dead, every later call of any thread too, and its locks
are gone. After each death: what is listed is whole and legal, and a new engine sweeps and commits in the same root.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

from tests.support.faulty_filesystem import Killed, When

from .oracle import check_recovery
from .report import ALL, Extent, Row, command, extent_of
from .workloads import WORKLOADS, Folder, Told, Workload, faulty_filesystem, quiet

WRITERS = (1, 2, 4)


def run_killed(root: Path, told: Told, workload: Workload, num_writers: int, k: int, when: When, direct: bool) -> bool:
    """Whether the kill was reached (with several writers the number of calls varies a little)."""
    fs = faulty_filesystem(direct=direct)
    fs.kill_at(k, when)
    with quiet(), contextlib.suppress(Exception, Killed):
        workload.live(root, told, fs, num_writers)
    fs.dispose()
    return fs.killed


def count(folder: Folder, workload: Workload, num_writers: int, dirty: bool, direct: bool) -> tuple[int, list[bool]]:
    """How many calls a life has, and which of them are writes."""
    root, told = folder.root(dirty=dirty)
    fs = faulty_filesystem(direct=direct)
    workload.live(root, told, fs, num_writers)
    check_recovery(root, told, workload)
    folder.drop(root)
    writes = [op.name == "pwrite" for op in fs.operations if op.index >= 0]
    fs.dispose()
    return fs.num_counted, writes


def points(num_calls: int, writes: list[bool]) -> Iterator[tuple[int, When]]:
    for k in range(num_calls):
        yield k, "before"
        if writes[k]:
            yield k, "during"
        yield k, "after"


def sweep(
    folder: Folder,
    workload: Workload,
    how: Extent = ALL,
    *,
    num_writers: int,
    dirty: bool,
    direct: bool,
) -> Row:
    """Kill at the points of one workload."""
    start = "dirty" if dirty else "clean"
    row = Row(f"{workload.name}, {num_writers} writers, {start} start{', direct' if direct else ''}")
    row.operations, writes = count(folder, workload, num_writers, dirty, direct)
    for (k, when), root, told in folder.each(how.of(points(row.operations, writes)), dirty=dirty):
        if run_killed(root, told, workload, num_writers, k, when, direct):
            row.check(how, f"killed {when} call {k}", check_recovery, root, told, workload)
    return row


def main(options: argparse.Namespace) -> Iterator[Row]:
    with Folder() as folder:
        for workload, num_writers, dirty in itertools.product(WORKLOADS.values(), WRITERS, (False, True)):
            direct = dirty != (num_writers == 2)
            yield sweep(folder, workload, extent_of(options, 12), num_writers=num_writers, dirty=dirty, direct=direct)


if __name__ == "__main__":
    command("Killed at every file operation", __doc__, main)
