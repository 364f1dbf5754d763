"""Thousands of small checkpoints with faults, replacements, retention and kills. ``python -m tests.faults.soak --full``

One engine lives through all of it in this process; killed processes work in the same root beside it. At the end the
descriptors, threads and staging chunks are those of the start, memory has not grown, and every listed checkpoint is
right.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import errno
import gc
import os
import random
import threading
from pathlib import Path

from async_ckpt import CheckpointError, KeepLast
from tests.support.insides import arena_of, pipeline_of, threads_left
from tests.support.making import private_names
from tests.support.processes import Talking
from tests.support.stepping import until

from .oracle import check_legal, contents
from .report import Row, command
from .workloads import TIMEOUT_S, Folder, Job, Told, faulty_filesystem, make_engine, quiet

CHILD = """
import sys
from pathlib import Path
from tests.faults.workloads import Job, Told, make_engine
with make_engine(Path(sys.argv[1]), overwrite="replace") as engine:
    for version in range(int(sys.argv[2]), 1 << 60):
        Job(engine, Told()).whole(f"beside-{version % 3}", version)
        print(version, flush=True)
"""
_CODES = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EMFILE)


def resources() -> tuple[int, int, int]:
    """(descriptors, threads, resident bytes)."""
    gc.collect()
    with open("/proc/self/statm", encoding="ascii") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), resident


def soak(root: Path, told: Told, num_commits: int, num_kills: int, seed: int) -> Row:
    """See the module; raises AssertionError when anything is lost or leaks."""
    chance = random.Random(seed)
    row = Row(f"{num_commits} commits, {num_kills} kills")
    fs = faulty_filesystem(direct=True)
    kills = set(chance.sample(range(num_commits // 10, num_commits), num_kills))
    # The engine that prepared the root may still have a thread that is about to end.
    threads_left()
    before = middle = resources()
    with quiet():
        engine = make_engine(root, fs, overwrite="replace", retention=KeepLast(6), max_pending_commits=2)
        job = Job(engine, told)
        for k in range(num_commits):
            version = 100 + k
            is_faulty = chance.random() < 0.3
            if is_faulty:
                fs.fail_at(chance.randrange(60), chance.choice(_CODES), sticky=chance.random() < 0.3)
                row.injected += 1
            with contextlib.suppress(CheckpointError):
                job.whole(f"t{chance.randrange(12)}", version)
            row.survived += is_faulty
            fs.heal()
            assert all(isinstance(failure, CheckpointError) for failure in job.give_up())
            if k in kills:
                kill_one(root, version, chance)
                row.injected += 1
                row.survived += 1
            # The record of calls is this test's own.
            row.operations += len(fs.operations)
            fs.operations.clear()
            if k == num_commits // 2:
                concurrent.futures.wait(pipeline_of(engine).warming, TIMEOUT_S)
                middle = resources()
        job.give_up()
        assert arena_of(engine).num_taken == 0
        # What the last commits have left to do in the background may still have a file open.
        with contextlib.suppress(AssertionError):
            until(lambda: resources()[:2] == middle[:2])
        end = resources()
        assert end[:2] == middle[:2], f"descriptors and threads: {middle[:2]}, then {end[:2]}"
        assert end[2] - middle[2] < 24 << 20, f"memory grew by {end[2] - middle[2]} bytes in {num_commits // 2} commits"
        engine.close()
    threads_left()
    fs.dispose()
    after = resources()
    assert after[:2] == before[:2], f"descriptors and threads: {before[:2]}, then {after[:2]}"
    with make_engine(root):
        assert private_names(root) == []
    found = {tag: version for tag, version in contents(root).items() if not tag.startswith("beside")}
    check_legal(found, told, keeps=0)
    return row


def kill_one(root: Path, version: int, chance: random.Random) -> None:
    """Another process commits into the root and is killed after a few commits, somewhere in the next."""
    with Talking(CHILD, root, version) as child:
        for _ in range(chance.randrange(1, 4)):
            child.hear()
        child.kill()


def main(options: argparse.Namespace) -> list[Row]:
    with Folder() as folder:
        root, told = folder.root()
        return [soak(root, told, *((5000, 40) if options.full else (400, 4)), options.seed)]


if __name__ == "__main__":
    command("Soak", __doc__, main)
