"""Real processes killed by SIGKILL at real system calls. ``python -m tests.faults.kills --full``

strace injects the signal at a thread's k-th call of one kind, in whichever thread gets there first. What the process
had printed as committed must be there afterwards; the rest of the oracle is that of `tests.faults.crash`.
"""

from __future__ import annotations

import argparse
import functools
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from .oracle import check_recovery
from .report import Row, Sample, command, sample_of, sampled
from .workloads import TIMEOUT_S, Folder, Told

ROOT = Path(__file__).parents[2]
CALLS = (
    "openat",
    "pwrite64",
    "ftruncate",
    "fallocate",
    "fsync",
    "close",
    "mkdir",
    "renameat2",
    "unlink",
    "rmdir",
    "chmod",
    "flock",
)
JOB = """
import os, sys
from pathlib import Path
from tests.faults.workloads import Job, Told, make_engine
root = Path(sys.argv[1])
# Everything is imported and warm; from this call on, strace counts.
os.chdir(root)
with make_engine(root, overwrite="replace", io_mode="direct") as engine:
    job = Job(engine, Told())
    for tag, version in (("new", 10), ("older", 11), ("new", 12)):
        job.whole(tag, version, ("model.pt", "sub/optim.pt"))
        print(tag, version, flush=True)
"""


@functools.lru_cache(maxsize=1)
def why_not() -> str | None:
    """Why strace cannot inject here; None when it can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(
        ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "inject=getpid:signal=SIGKILL:when=999", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"strace may not trace here: {tried.stderr.strip()}"


def run_killed(root: Path, told: Told, call: str, k: int, log: Path) -> bool:
    """Run the job under strace with its path filter on the root; whether the kill came."""
    for tag, version in (("new", 10), ("older", 11), ("new", 12)):
        told.attempt(tag, version)
    inject = [] if k < 0 else ["-e", f"inject={call}:signal=SIGKILL:when={k + 1}"]
    arguments = [
        "strace",
        "-f",
        "-qq",
        "-o",
        str(log),
        "-e",
        f"trace={call}",
        *inject,
        sys.executable,
        "-c",
        JOB,
        str(root),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=2 * TIMEOUT_S, cwd=ROOT, check=False)
    for line in done.stdout.splitlines():
        tag, version = line.split()
        told.commit(tag, int(version))
    assert done.returncode in (0, -9, 137), done.stderr
    return done.returncode != 0


def count(folder: Folder, call: str) -> tuple[int, int, int]:
    """How many such calls a whole run makes on the root or after; and, as strace counts, the first and last number in
    one thread.
    """
    root, told = folder.root()
    log = folder.path / "strace.log"
    assert not run_killed(root, told, call, -1, log)
    lines = log.read_text().splitlines()
    if not lines:
        # In memory, nothing is reserved.
        return 0, 0, 0
    # Importing makes the same calls by the thousand: only those from the first one on the root count.
    started = (
        next((number for number, line in enumerate(lines) if str(root) in line), 0)
        if call in ("openat", "close")
        else 0
    )
    threads = Counter(line.split()[0] for line in lines)
    main_thread = lines[0].split()[0]
    first = sum(line.split()[0] == main_thread for line in lines[:started])
    check_recovery(root, told)
    folder.drop(root)
    return len(lines) - started, first, max(max(threads.values()), first + 1)


def sweep(folder: Folder, call: str, *, sample: Sample, seed: int = 1, stop: bool = True) -> Row:
    row = Row(call)
    row.operations, first, last = count(folder, call)
    # The signal comes when any one thread makes its k-th such call.
    chosen = list(range(first, last))
    if isinstance(sample, int):
        # Threads share the calls differently each time; some thread always makes its first few.
        chosen = chosen[: max(1, len(chosen) // 3)]
    chosen = sampled(chosen, sample, random.Random(seed))
    for k in chosen:
        root, told = folder.root()
        if run_killed(root, told, call, k, folder.path / "strace.log"):
            row.check(
                f"killed at {call} number {k}", lambda root=root, told=told: check_recovery(root, told), stop=stop
            )  # type: ignore[misc]
        folder.drop(root)
    return row


def main(options: argparse.Namespace) -> list[Row]:
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    rows = []
    with Folder(on_disk=options.folder) as folder:
        for call in CALLS if options.call is None else [options.call]:
            rows.append(sweep(folder, call, sample=sample_of(options, 3), seed=options.seed, stop=False))
            print(rows[-1].name, rows[-1].operations, rows[-1].injected, rows[-1].lost, flush=True)
    return rows


if __name__ == "__main__":
    command(
        "SIGKILL at real system calls",
        __doc__,
        main,
        ("--folder", {"default": None, "help": "where the roots are (default: in memory)"}),
        ("--call", {"default": None, "choices": CALLS, "help": "only this system call"}),
    )
