"""Processes that end in every way: nothing hangs, nothing that was reported is lost, nothing lost goes unreported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from async_ckpt import Catalog

pytestmark = pytest.mark.wide

ROOT = Path(__file__).parents[2]

HEAD = """
import gc, os, signal, sys, threading, warnings
sys.path.insert(0, {package!r})
import tempfile
tempfile.TemporaryDirectory()          # weakref's own exit hook comes before ours
import errno, torch
from tests.faults.workloads import Job, Told, faulty_filesystem, make_engine, state
root = {root!r}
told = Told()
fs = faulty_filesystem()
def hold(name):
    gate = threading.Event()
    reached = threading.Event()
    def step(op):
        if op.name == name and op.path.endswith("model.pt"):
            reached.set(); gate.wait()
    fs.before = step
    return gate, reached
def commit(engine, tag, version=1):
    return Job(engine, told).start(tag, version)
"""

ENDINGS: dict[str, tuple[str, int, list[str], list[str]]] = {
    # name: (code, exit status, tags that must be there, words that stderr must hold)
    "no close": (
        "engine = make_engine(root, fs); commit(engine, 'a'); commit(engine, 'b')",
        0,
        ["a", "b"],
        ["never closed", "'b'"],
    ),
    "no close, a failure": (
        "engine = make_engine(root, fs); fs.fail_when(lambda op: op.name == 'fsync' and '.b.' in op.path, errno.EIO)\n"
        "commit(engine, 'a'); commit(engine, 'b')",
        1,
        ["a"],
        ["lost", "EIO"],
    ),
    "no commit": (
        "engine = make_engine(root, fs); engine.create('x'); engine.save(state(1), 'model.pt')",
        0,
        [],
        ["'x'", "never committed"],
    ),
    "os._exit": (
        "engine = make_engine(root, fs); commit(engine, 'a').result(); commit(engine, 'b'); os._exit(7)",
        7,
        ["a"],
        [],
    ),
    "sys.exit": ("engine = make_engine(root, fs); commit(engine, 'a'); sys.exit(3)", 3, ["a"], ["never closed"]),
    "an exception in the block": (
        "with make_engine(root, fs) as engine:\n    commit(engine, 'a'); engine.create('x'); "
        "engine.save(state(1), 'model.pt'); 1 / 0",
        1,
        ["a"],
        ["ZeroDivisionError", "'x'"],
    ),
    "a generator that is dropped": (
        "def train():\n    with make_engine(root, fs) as engine:\n        commit(engine, 'a'); "
        "engine.create('x'); yield\n"
        "g = train(); next(g); g.close(); print('closed')",
        0,
        ["a"],
        ["'x'"],
    ),
    "dropped by garbage collection": (
        "engine = make_engine(root, fs); engine.me = engine; commit(engine, 'a'); del engine; gc.collect()\n"
        "from async_ckpt import Catalog; assert Catalog(root).latest() == 'a'",
        0,
        ["a"],
        ["never closed"],
    ),
    "dropped on its own thread": (
        "engine = make_engine(root, fs); engine.me = engine; pool = engine._commits.pool\n"
        "p = commit(engine, 'a'); del engine; pool.copier.submit(gc.collect).result(60); p.result(60)",
        0,
        ["a"],
        [],
    ),
    "a stuck disk": (
        "engine = make_engine(root, fs, close_timeout_s=0.3); commit(engine, 'a').result(60)\n"
        "gate, reached = hold('pwrite'); commit(engine, 'b'); assert reached.wait(60)",
        1,
        ["a"],
        ["lost", "did not end within"],
    ),
    "a stuck disk, not committed": (
        "engine = make_engine(root, fs, close_timeout_s=0.3); commit(engine, 'a').result(60)\n"
        "gate, reached = hold('pwrite'); engine.create('b'); engine.save(state(1), 'model.pt'); assert "
        "reached.wait(60)",
        1,
        ["a"],
        ["did not end within"],
    ),
    "a stuck disk, save waits": (
        "engine = make_engine(root, fs, close_timeout_s=0.3, backpressure_timeout_s=0.3)\n"
        "gate, reached = hold('pwrite'); engine.create('b')\n"
        "from async_ckpt import BackpressureTimeout, CheckpointError\n"
        "try:\n    engine.save(state(1, num_floats=200_000), 'model.pt')\n"
        "except BackpressureTimeout: print('bounded')\n"
        "try:\n    engine.close()\nexcept CheckpointError as error: print(type(error).__name__)",
        0,
        [],
        [],
    ),
    "KeyboardInterrupt twice on a stuck disk": (
        "gate, reached = hold('pwrite')\n"
        "with make_engine(root, fs) as engine:\n"
        "    commit(engine, 'b'); assert reached.wait(60)\n"
        "    main = threading.main_thread().ident\n"
        "    wait = engine._commits.pool.waiting_for\n"
        "    close = engine._commits.unfinished\n"
        "    def again():\n        signal.setitimer(signal.ITIMER_REAL, 0.05); return close()\n"
        "    signal.signal(signal.SIGALRM, signal.default_int_handler)\n"
        "    engine._commits.unfinished = again\n"
        "    raise KeyboardInterrupt",
        -2,
        [],
        ["KeyboardInterrupt"],
    ),
    "SIGTERM while committing": (
        "gate, reached = hold('fsync'); engine = make_engine(root, fs); p = commit(engine, 'b'); assert "
        "reached.wait(60)\n"
        "os.kill(os.getpid(), signal.SIGTERM)",
        -15,
        [],
        [],
    ),
    "SIGTERM with a handler that exits": (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); engine = make_engine(root, fs); commit(engine, 'b')\n"
        "os.kill(os.getpid(), signal.SIGTERM)",
        143,
        ["b"],
        [],
    ),
    "a handler that exits with 0 while the block's end waits": (
        "signal.signal(signal.SIGALRM, lambda *_: (threading.Timer(0.5, gate.set).start(), sys.exit(0)))\n"
        "gate, reached = hold('fsync')\n"
        "with make_engine(root, fs) as engine:\n"
        "    commit(engine, 'a'); assert reached.wait(60); signal.setitimer(signal.ITIMER_REAL, 0.2)",
        0,
        ["a"],
        [],
    ),
    "a handler that exits with 0 while the block's end waits, a failure": (
        "signal.signal(signal.SIGALRM, lambda *_: (threading.Timer(0.5, gate.set).start(), sys.exit(0)))\n"
        "gate, reached = hold('fsync'); fs.fail_when(lambda op: op.name == 'fsync' and '.b.' in op.path, errno.EIO)\n"
        "with make_engine(root, fs) as engine:\n"
        "    commit(engine, 'b'); assert reached.wait(60); signal.setitimer(signal.ITIMER_REAL, 0.2)",
        1,
        [],
        ["EIO"],
    ),
    "a handler that exits with 0 while exit waits": (
        "signal.signal(signal.SIGALRM, lambda *_: (threading.Timer(0.5, gate.set).start(), sys.exit(0)))\n"
        "gate, reached = hold('fsync'); engine = make_engine(root, fs)\n"
        "commit(engine, 'a'); assert reached.wait(60); signal.setitimer(signal.ITIMER_REAL, 0.2)",
        0,
        ["a"],
        [],
    ),
    "sys.exit(0) in the block, a failure": (
        "fs.fail_when(lambda op: op.name == 'fsync' and '.b.' in op.path, errno.EIO)\n"
        "with make_engine(root, fs) as engine:\n    commit(engine, 'b'); sys.exit(0)",
        1,
        [],
        ["EIO"],
    ),
    "a fork in flight": (
        "gate, reached = hold('fsync'); engine = make_engine(root, fs); p = commit(engine, 'b'); assert "
        "reached.wait(60)\n"
        "from async_ckpt import TransactionStateError\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    for call in (lambda: engine.create('c'), lambda: engine.save({}, 'x'), lambda: engine.commit('b'), "
        "engine.close, p.result):\n"
        "        try: call() if call != p.result else p.result(0)\n"
        "        except (TransactionStateError, TimeoutError): continue\n"
        "        os._exit(9)\n"
        "    fs.before = None\n"
        "    import torch; torch.set_num_threads(1)  # OpenMP's threads did not survive the fork\n"
        "    with make_engine(root) as own: own.create('child'); own.save(state(5), 'model.pt'); own.commit('child')\n"
        "    sys.exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0; gate.set(); p.result(60); engine.close()",
        0,
        ["b", "child"],
        [],
    ),
    "an error that is not ours, and a second engine": (
        "other = make_engine(root + '-2'); other._commits._failures.append(RuntimeError('raw'))\n"
        "engine = make_engine(root, fs); commit(engine, 'b')",
        1,
        ["b"],
        ["raw"],
    ),
    **{
        f"a failure, {name}": (
            "engine = make_engine(root, fs); fs.fail_when(lambda op: op.name == 'fsync' and '.b.' in op.path, "
            "errno.EIO)\n"
            f"commit(engine, 'a'); commit(engine, 'b'); {code}",
            1,
            ["a"],
            [],
        )
        for name, code in {
            "warnings are errors": "warnings.simplefilter('error')",
            "showwarning raises": "warnings.showwarning = lambda *_, **__: 1 / 0",
            "stderr is closed": "sys.stderr.close()",
            "stdout is closed": "sys.stdout.close()",
            "stdout is a full disk": "sys.stdout = open('/dev/full', 'w'); print('x')",
            "no streams": "sys.stdout = sys.stderr = None",
            "handlers exit": "import logging; logging.Handler.handle = lambda *_: sys.exit(0)",
        }.items()
    },
    "no close, warnings are errors": (
        "engine = make_engine(root, fs); commit(engine, 'a'); engine.create('x'); warnings.simplefilter('error')",
        0,
        ["a"],
        ["never closed", "'x'"],
    ),
    "Ctrl-C while exit waits": (
        "gate, reached = hold('fsync'); engine = make_engine(root, fs); commit(engine, 'b'); assert reached.wait(60)\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler); signal.setitimer(signal.ITIMER_REAL, 0.3)",
        1,
        [],
        ["lost"],
    ),
    "Ctrl-C while exit waits, and another engine": (
        "other = make_engine(root + '-2'); commit(other, 'c')\n"
        "gate, reached = hold('fsync'); engine = make_engine(root, fs); commit(engine, 'b'); assert reached.wait(60)\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler); signal.setitimer(signal.ITIMER_REAL, 0.3)\n"
        "import atexit; from async_ckpt import Catalog\n"
        "flush = sys.stdout.flush; sys.stdout.flush = lambda: (os.write(2, str(Catalog(root + "
        "'-2').tags()).encode()), flush())",
        1,
        [],
        ["lost", "['c']"],
    ),
    "a log record that cannot be written": (
        "import logging\n"
        "class Broken(logging.Handler):\n"
        "    def emit(self, record): sys.exit(3)\n"
        "logging.getLogger().addHandler(Broken())\n"
        "with make_engine(root, fs) as engine:\n"
        "    fs.fail_when(lambda op: op.name == 'fsync' and '.b.' in op.path, errno.EIO)\n"
        "    assert commit(engine, 'b').exception(20) is not None; commit(engine, 'a').result(60)",
        0,
        ["a"],
        [],
    ),
    "a callback that exits": (
        "with make_engine(root, fs) as engine:\n    p = commit(engine, 'a')\n"
        "    p.add_done_callback(lambda p: sys.exit(5)); p.result(60); commit(engine, 'c').result(60)",
        0,
        ["a", "c"],
        ["SystemExit"],
    ),
    "a callback that raises": (
        "with make_engine(root, fs) as engine:\n    p = commit(engine, 'a')\n"
        "    p.add_done_callback(lambda p: 1 / 0); p.add_done_callback(lambda p: print('second'))",
        0,
        ["a"],
        [],
    ),
}


@pytest.mark.leaves_staging
@pytest.mark.parametrize("name", ENDINGS)
def test_an_ending(tmp_path: Path, name: str) -> None:
    code, status, tags, words = ENDINGS[name]
    script = HEAD.format(package=str(ROOT), root=str(tmp_path / "run")) + code
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == status or (status == -2 and done.returncode == 130), (
        done.returncode,
        done.stdout,
        done.stderr,
    )
    catalog = Catalog(tmp_path / "run")
    found = [tag for tag in catalog.tags() if catalog.verify(tag).ok]
    # What was never reported may be there, whole, or not.
    assert set(tags) <= set(found) <= {*tags, "b"}, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


OPEN_AND_CLOSE = """
import os, sys, tempfile
sys.path.insert(0, {package!r})
import async_ckpt, torch

# Forked, for each to end as an interpreter does without importing torch anew.
root, failed, child = tempfile.mkdtemp(dir={folder!r}), [], 0
for k in range({num_processes}):
    child = os.fork()
    if child == 0:
        async_ckpt.AsyncCheckpointEngine(os.path.join(root, str(k)), staging_bytes=16 << 20).close()
        break
    failed.append(os.waitpid(child, 0)[1])
if child:
    print(sorted(set(failed)))
"""


@pytest.mark.parametrize("num_processes", [8, pytest.param(50, marks=pytest.mark.slow)])
def test_processes_that_open_and_close_end_well(tmp_path: Path, num_processes: int) -> None:
    script = OPEN_AND_CLOSE.format(package=str(ROOT), folder=str(tmp_path), num_processes=num_processes)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[0]", "")
