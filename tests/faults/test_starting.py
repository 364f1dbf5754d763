"""Engines that cannot be made, for want of descriptors, memory, threads or a root: nothing stays behind."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from async_ckpt import Catalog, ConfigError, WriteError
from tests.support.faulty_filesystem import FaultyFileSystem
from tests.support.insides import threads_left
from tests.support.processes import ROOT, run_python

from .workloads import Job, Told, faulty_filesystem, make_engine, quiet

pytestmark = pytest.mark.wide

CHILD = """
import gc, mmap, os, resource, sys, threading
from pathlib import Path
from async_ckpt import CheckpointError, ConfigError, WriteError
from tests.faults.workloads import Job, Told, make_engine
from tests.support.insides import threads_left
root, kind = Path(sys.argv[1]), sys.argv[2]

def standing():
    gc.collect()
    return sorted(os.listdir("/proc/self/fd")), threads_left(), threading.active_count(), os.path.exists(root)

def allowed(more):
    if kind == "descriptors":
        return resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd"))) + more
    with open("/proc/self/statm") as statm:
        return resource.RLIMIT_AS, int(statm.read().split()[0]) * mmap.PAGESIZE + (more << 20)

# What is imported or made once is not what an engine takes.
with make_engine(root / "first") as engine:
    Job(engine, Told()).whole("a", 1)
root = root / "run" / "deep"
outcomes = []
for more in (range(1, 16) if kind == "descriptors" else range(0, 130, 6)):
    which, limit = allowed(more)
    before = standing()
    soft, hard = resource.getrlimit(which)
    resource.setrlimit(which, (limit, hard))
    error = engine = None
    try:
        engine = make_engine(root, staging_bytes=8 << 20, num_writers=4, sweep_on_start=False)
    except CheckpointError as failure:
        error = failure
        outcomes.append(type(failure).__name__)
        assert isinstance(error, (ConfigError, WriteError)) and error.__cause__ is not None, repr(error)
    resource.setrlimit(which, (soft, hard))
    if engine is not None:
        engine.close()
        outcomes.append("made")
        break
    del error
    after = standing()
    assert after == before, (more, before, after)
with make_engine(root) as engine:
    Job(engine, Told()).whole("a", 1)
print(" ".join(outcomes))
"""


@pytest.mark.parametrize("kind", ["descriptors", "memory"])
def test_an_engine_that_meets_the_limits_of_its_process(tmp_path: Path, kind: str) -> None:
    """One more descriptor, or a few more megabytes (a thread's stack has eight), until an engine can be made."""
    done = run_python("-W", "always", "-c", CHILD, tmp_path, kind)
    assert done.returncode == 0, done.stderr
    outcomes = done.stdout.split()
    assert len(outcomes) > 3 and outcomes[-1] == "made" and set(outcomes[:-1]) <= {"WriteError", "ConfigError"}, (
        outcomes
    )


def _count_calls(root: Path) -> int:
    fs = faulty_filesystem()
    make_engine(root, fs).close()
    return sum(op.index >= 0 for op in fs.operations)


def test_an_error_at_every_call_of_the_constructor(tmp_path: Path) -> None:
    for k in range(_count_calls(tmp_path / "count")):
        fs: FaultyFileSystem = faulty_filesystem()
        fs.fail_at(k, errno.EIO)
        root = tmp_path / f"r{k}" / "deep"
        try:
            with quiet():
                make_engine(root, fs).close()
        except WriteError as error:
            assert error.errno == errno.EIO and error.path
            # What the disk will not delete stays, and is tried again after commits.
            refused = next(op.name for op in fs.operations if op.outcome == "EIO")
            assert refused in ("unlink", "rmdir") or not root.parent.exists(), k
        assert threads_left() == []
        fs.heal()
        with make_engine(root, fs) as engine:
            Job(engine, Told()).whole("a", 1)


def test_a_root_that_cannot_be_made_leaves_no_thread(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    for root in (tmp_path / "file" / "run", Path("/proc/no-such-place")):
        with pytest.raises(WriteError) as caught:
            make_engine(root)
        assert caught.value.path and str(root) in str(caught.value)
        assert threads_left() == []


def test_more_staging_memory_than_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="staging_bytes"):
        make_engine(tmp_path / "run", staging_bytes=1 << 60, chunk_bytes=1 << 30)
    assert not (tmp_path / "run").exists()


WORKER = """
import multiprocessing, os, sys
from pathlib import Path
from tests.faults.workloads import Job, Told, faulty_filesystem, make_engine, state
root, how = Path(sys.argv[1]), sys.argv[2]

def work(root, queue, fails):
    fs = faulty_filesystem()
    if fails:
        fs.fail_when(lambda op: op.name == "fsync" and ".b." in op.path, 5)
    engine = make_engine(root, fs)
    Job(engine, Told()).start("a", 1)
    Job(engine, Told()).start("b", 2)
    engine.create("c")
    engine.save(state(3), "model.pt")
    queue.put("x" * 100_000)
    globals()["kept"] = engine

if __name__ == "__main__":
    context = multiprocessing.get_context(how)
    for fails in (False, True):
        queue = context.Queue()
        child = context.Process(target=work, args=(root / str(fails), queue, fails))
        child.start()
        assert queue.get(timeout=60) == "x" * 100_000
        child.join(60)
        print(child.exitcode)
"""


@pytest.mark.parametrize("how", ["fork", "forkserver", "spawn"])
def test_an_engine_in_a_child_of_multiprocessing_finishes_its_commits(tmp_path: Path, how: str) -> None:
    """Such children skip atexit: their pending commits were lost without a word, with exit code 0."""
    script = tmp_path / "job.py"
    script.write_text(WORKER)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = run_python("-W", "always", script, tmp_path / "run", how, env=environment)
    assert done.stdout.split() == ["0", "1"], done.stderr
    assert Catalog(tmp_path / "run" / "False").tags() == ["a", "b"]
    assert Catalog(tmp_path / "run" / "True").tags() == ["a"]
    for words in ("never closed", "'c' was created but never committed", "a checkpoint was lost"):
        assert words in done.stderr, done.stderr
