"""An errno, or SIGKILL, at real system calls of every thread. ``python -m tests.faults.syscalls --full``

strace, attached to a running process, makes each thread's k-th call of one kind fail, or the last of the process, below
Python and the seam. Only the public interface is used: what `commit` reported is there with exactly its bytes, each
listed tag loads right, the process ends in bounded time, every error is of our tree, and a new engine commits in the
same root.
"""

from __future__ import annotations

import argparse
import faulthandler
import itertools
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch

import async_ckpt
from async_ckpt import CheckpointError, KeepLast
from async_ckpt.threads.executor import lower_priority

from .children import Child, begin_notes
from .oracle import check_recovery
from .report import ALL, Extent, Row, command, extent_of
from .workloads import NUM_FLOATS, Folder, Job, Told, Workload, make_engine, state, version_of

FAULTS = {
    "pwrite64": ("EIO", "ENOSPC", "EDQUOT", "EINTR", "SIGKILL"),
    "fsync": ("EIO", "ENOSPC", "EINTR", "SIGKILL"),
    "ftruncate": ("EIO", "ENOSPC", "SIGKILL"),
    "fallocate": ("EIO", "ENOSPC", "EOPNOTSUPP", "SIGKILL"),
    "openat": ("EIO", "EMFILE", "ENOSPC", "EACCES", "SIGKILL"),
    "close": ("EIO", "SIGKILL"),
    "mkdir": ("EIO", "ENOSPC", "EROFS", "SIGKILL"),
    "renameat2": ("EIO", "EXDEV", "EACCES", "EINVAL", "SIGKILL"),
    "rename": ("EIO", "EXDEV"),
    "unlink": ("EIO", "EACCES", "SIGKILL"),
    "rmdir": ("EIO", "EBUSY", "SIGKILL"),
    "chmod": ("EIO", "EPERM", "SIGKILL"),
    "flock": ("EIO", "ENOLCK", "EAGAIN", "SIGKILL"),
    "newfstatat": ("EIO", "EACCES"),
    "statfs": ("EIO",),
    "getdents64": ("EIO",),
    "pread64,preadv,preadv2,read": ("EIO",),
    "sendto": ("EIO",),
    "recvfrom": ("EIO",),
    "epoll_wait": ("EINTR", "EIO"),
    "clone3,clone": ("EAGAIN",),
    "mmap,madvise": ("ENOMEM",),
}
"""What each call fails with; SIGKILL: there the process dies."""
ALONE = (
    "setpriority,getpriority",
    "madvise",
    "sched_setaffinity,sched_getaffinity",
    "fallocate",
    "renameat2",
    "statfs",
    "statx",
    "flock",
    "ioprio_set",
)
OPTIONAL = (*ALONE, ",".join(ALONE))
"""What a sandbox may refuse for good, each alone and all of them: the package does without."""
COMMITS = (("new", 10), ("older", 11), ("new", 12), ("last", 13))
KEEPS = Workload("syscalls", lambda job: None, keeps=3)


@lru_cache(maxsize=1)
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


def job(root: Path, fault: str, log: str) -> None:
    """The process: attaches strace to itself, commits, and notes how each commit ended."""
    note = begin_notes(root)
    faulthandler.enable(all_threads=True)
    # Torch opens libraries of its own in its first operations, and dies of a segmentation fault where it cannot.
    state(1)
    call = fault.partition(":")[0]
    inject = ["-e", f"inject={fault}"] if ":" in fault else []
    arguments = ["strace", "-f", "-o", log, "-e", f"trace={call}", "-e", "signal=none", *inject, "-p", str(os.getpid())]
    # It attaches when told, and is heard, by calls that are not made to fail: all of Popen's own are over by then.
    waiting = ["sh", "-c", 'read go; exec "$@"', "sh", *arguments]
    tracer = subprocess.Popen(waiting, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    assert tracer.stdin is not None and tracer.stderr is not None
    os.writev(tracer.stdin.fileno(), [b"\n"])
    said = bytearray(4096)
    os.readv(tracer.stderr.fileno(), [said])
    assert b"attached" in said, said
    try:
        engine = make_engine(root, overwrite="replace", io_mode="direct", retention=KeepLast(3), num_writers=4)
        with engine:
            for tag, version in COMMITS:
                try:
                    Job(engine, Told()).whole(tag, version, ("model.pt", "sub/optim.pt"))
                except CheckpointError as error:
                    note(f"failed {type(error).__name__}")
                else:
                    note(f"{tag} {version}")
            if "when=" not in fault:
                lower_priority()
                target = {"w": torch.zeros(NUM_FLOATS)}
                engine.load_into(target, "last/model.pt", strict=False)
                assert version_of(engine.load("last/model.pt") | target, "model.pt") == 13
    except CheckpointError as error:
        note(f"failed {type(error).__name__}")
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        package = os.path.dirname(async_ckpt.__file__)
        ours = any(frame.filename.startswith(package) for frame in frames) and "importlib" not in frames[-1].filename
        note(f"{'foreign' if ours else 'python'} {error!r}".replace("\n", " "))
        raise
    finally:
        note("ended")


def run(root: Path, told: Told, fault: str, log: Path) -> Child:
    return Child(root, told, COMMITS, job, fault, str(log))


def check(root: Path, told: Told, child: Child, *, killed: bool = False) -> None:
    notes = child.notes()
    assert not [line for line in notes if line.startswith("foreign")], (notes, child.errors())
    assert (killed and child.was_killed) or notes[-1:] == ["ended"], (child.exit_code, notes, child.errors())
    check_recovery(root, told, KEEPS)


def count(folder: Folder, call: str) -> tuple[int, int]:
    """How many such calls a whole run makes, and the most that any one thread makes."""
    root, told = folder.root()
    log = folder.path / "strace.log"
    child = run(root, told, call, log)
    check(root, told, child)
    assert child.exit_code == 0 and len(told.committed) >= 3, told
    threads = Counter(line.split()[0] for line in log.read_text().splitlines() if "(" in line)
    folder.drop(root)
    return sum(threads.values()), max(threads.values(), default=0)


def sweep(folder: Folder, call: str, codes: tuple[str, ...], how: Extent = ALL) -> Row:
    """Each errno (or SIGKILL) at each call."""
    row = Row(call)
    row.operations, most = count(folder, call)
    for (code, k), root, told in folder.each(how.of(itertools.product(codes, range(1, most + 1)))):
        kills = code == "SIGKILL"
        fault = f"{call}:{'signal' if kills else 'error'}={code}:when={k}"
        child = run(root, told, fault, folder.path / "strace.log")
        row.check(how, f"{code} at {call} number {k}", partial(check, root, told, child, killed=kills))
        child.close()
    return row


def _check_whole(root: Path, told: Told, child: Child) -> None:
    check(root, told, child)
    assert child.exit_code == 0 and told.committed == told.committed | dict(COMMITS), child.notes()


def refuse(folder: Folder, call: str, how: Extent = ALL) -> Row:
    """Every one of these calls fails, as in a sandbox: all commits succeed all the same."""
    row = Row(f"{call} refused")
    for code, root, told in folder.each(("EPERM", "ENOSYS", "EINVAL")):
        child = run(root, told, f"{call}:error={code}", folder.path / "strace.log")
        row.check(how, f"{code} at every {call}", _check_whole, root, told, child)
        row.operations += (folder.path / "strace.log").read_text().count("INJECTED")
        child.close()
    return row


def main(options: argparse.Namespace) -> Iterator[Row]:
    reason = why_not()
    if reason is not None:
        sys.exit(reason)
    with Folder() as folder:
        for call, codes in FAULTS.items():
            if options.call is None or options.call in call:
                yield sweep(folder, call, codes, extent_of(options, 4))
        for call in OPTIONAL:
            if options.call is None or options.call in call:
                yield refuse(folder, call, extent_of(options))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    command(
        "Errors and kills at real system calls",
        __doc__,
        main,
        ("--call", {"default": None, "help": "only this system call"}),
    )
