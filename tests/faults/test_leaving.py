"""Processes that end in every way: nothing hangs, nothing that was reported is lost, nothing lost goes unreported."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_ckpt import Catalog
from tests.support.processes import ROOT, run_python

pytestmark = pytest.mark.wide

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
def fail_b():
    fs.fail_when(lambda op: op.name == "fsync" and ".b." in op.path, errno.EIO)
def commit(engine, tag, version=1):
    return Job(engine, told).start(tag, version)
def alarm(after_s, handler=signal.default_int_handler):
    signal.signal(signal.SIGALRM, handler); signal.setitimer(signal.ITIMER_REAL, after_s)
def exit_well(*_):
    threading.Timer(0.5, gate.set).start(); sys.exit(0)
"""

TOLD = """
## no close | 0 | a b | never closed | 'b'
engine = make_engine(root, fs); commit(engine, 'a'); commit(engine, 'b')
## no close, a failure | 1 | a | lost | EIO
engine = make_engine(root, fs); fail_b(); commit(engine, 'a'); commit(engine, 'b')
## no close, warnings are errors | 0 | a | never closed | 'x'
engine = make_engine(root, fs); commit(engine, 'a'); engine.create('x'); warnings.simplefilter('error')
## no commit | 0 | | 'x' | never committed
engine = make_engine(root, fs); engine.create('x'); engine.save(state(1), 'model.pt')
## os._exit | 7 | a
engine = make_engine(root, fs); commit(engine, 'a').result(); commit(engine, 'b'); os._exit(7)
## sys.exit | 3 | a | never closed
engine = make_engine(root, fs); commit(engine, 'a'); sys.exit(3)
## an exception in the block | 1 | a | ZeroDivisionError | 'x'
with make_engine(root, fs) as engine:
    commit(engine, 'a'); engine.create('x'); engine.save(state(1), 'model.pt'); 1 / 0
## a generator that is dropped | 0 | a | 'x'
def train():
    with make_engine(root, fs) as engine:
        commit(engine, 'a'); engine.create('x'); yield
g = train(); next(g); g.close(); print('closed')
## dropped by garbage collection | 0 | a | never closed
engine = make_engine(root, fs); engine.me = engine; commit(engine, 'a'); del engine; gc.collect()
from async_ckpt import Catalog; assert Catalog(root).latest() == 'a'
## dropped on its own thread | 0 | a
engine = make_engine(root, fs); engine.me = engine; pool = engine._commits.pool
p = commit(engine, 'a'); del engine; pool.copier.submit(gc.collect).result(60); p.result(60)
## a stuck disk | 1 | a | lost | did not end within
engine = make_engine(root, fs, close_timeout_s=0.3); commit(engine, 'a').result(60)
gate, reached = hold('pwrite'); commit(engine, 'b'); assert reached.wait(60)
## a stuck disk, not committed | 1 | a | did not end within
engine = make_engine(root, fs, close_timeout_s=0.3); commit(engine, 'a').result(60)
gate, reached = hold('pwrite'); engine.create('b'); engine.save(state(1), 'model.pt'); assert reached.wait(60)
## a stuck disk, save waits | 0
from async_ckpt import BackpressureTimeout, CheckpointError
engine = make_engine(root, fs, close_timeout_s=0.3, backpressure_timeout_s=0.3)
gate, reached = hold('pwrite'); engine.create('b')
try:
    engine.save(state(1, num_floats=200_000), 'model.pt')
except BackpressureTimeout: print('bounded')
try:
    engine.close()
except CheckpointError as error: print(type(error).__name__)
## KeyboardInterrupt twice on a stuck disk | -2 | | KeyboardInterrupt
gate, reached = hold('pwrite')
with make_engine(root, fs) as engine:
    commit(engine, 'b'); assert reached.wait(60)
    close = engine._commits.unfinished
    def again():
        alarm(0.05); return close()
    engine._commits.unfinished = again
    raise KeyboardInterrupt
## SIGTERM while committing | -15
gate, reached = hold('fsync'); engine = make_engine(root, fs); p = commit(engine, 'b'); assert reached.wait(60)
os.kill(os.getpid(), signal.SIGTERM)
## SIGTERM with a handler that exits | 143 | b
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); engine = make_engine(root, fs); commit(engine, 'b')
os.kill(os.getpid(), signal.SIGTERM)
## a handler that exits with 0 while the block's end waits | 0 | a
gate, reached = hold('fsync')
with make_engine(root, fs) as engine:
    commit(engine, 'a'); assert reached.wait(60); alarm(0.2, exit_well)
## a handler that exits with 0 while the block's end waits, a failure | 1 | | EIO
gate, reached = hold('fsync'); fail_b()
with make_engine(root, fs) as engine:
    commit(engine, 'b'); assert reached.wait(60); alarm(0.2, exit_well)
## a handler that exits with 0 while exit waits | 0 | a
gate, reached = hold('fsync'); engine = make_engine(root, fs)
commit(engine, 'a'); assert reached.wait(60); alarm(0.2, exit_well)
## sys.exit(0) in the block, a failure | 1 | | EIO
fail_b()
with make_engine(root, fs) as engine:
    commit(engine, 'b'); sys.exit(0)
## a fork in flight | 0 | b child
gate, reached = hold('fsync'); engine = make_engine(root, fs); p = commit(engine, 'b'); assert reached.wait(60)
from async_ckpt import TransactionStateError
child = os.fork()
if child == 0:
    calls = [lambda: engine.create('c'), lambda: engine.save({}, 'x'), lambda: engine.commit('b'), engine.close]
    for call in [*calls, lambda: p.result(0)]:
        try: call()
        except (TransactionStateError, TimeoutError): continue
        os._exit(9)
    fs.before = None
    import torch; torch.set_num_threads(1)  # OpenMP's threads did not survive the fork
    with make_engine(root) as own: own.create('child'); own.save(state(5), 'model.pt'); own.commit('child')
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0; gate.set(); p.result(60); engine.close()
## an error that is not ours, and a second engine | 1 | b | raw
other = make_engine(root + '-2'); other._commits.house.failures.append(RuntimeError('raw'))
engine = make_engine(root, fs); commit(engine, 'b')
## Ctrl-C while exit waits | 1 | | lost
gate, reached = hold('fsync'); engine = make_engine(root, fs); commit(engine, 'b'); assert reached.wait(60); alarm(0.3)
## Ctrl-C while exit waits, and another engine | 1 | | lost | ['c']
other = make_engine(root + '-2'); commit(other, 'c')
gate, reached = hold('fsync'); engine = make_engine(root, fs); commit(engine, 'b'); assert reached.wait(60); alarm(0.3)
import atexit; from async_ckpt import Catalog
def tell(flush=sys.stdout.flush):
    os.write(2, str(Catalog(root + '-2').tags()).encode()); flush()
sys.stdout.flush = tell
## a log record that cannot be written | 0 | a
import logging
class Broken(logging.Handler):
    def emit(self, record): sys.exit(3)
logging.getLogger().addHandler(Broken())
with make_engine(root, fs) as engine:
    fail_b()
    assert commit(engine, 'b').exception(20) is not None; commit(engine, 'a').result(60)
## a callback that exits | 0 | a c | SystemExit
with make_engine(root, fs) as engine:
    p = commit(engine, 'a')
    p.add_done_callback(lambda p: sys.exit(5)); p.result(60); commit(engine, 'c').result(60)
## a callback that raises | 0 | a
with make_engine(root, fs) as engine:
    p = commit(engine, 'a')
    p.add_done_callback(lambda p: 1 / 0); p.add_done_callback(lambda p: print('second'))
"""
"""Each program below its name, exit status, the tags that must be there, and what standard error must hold."""

MUTED = {
    "warnings are errors": "warnings.simplefilter('error')",
    "showwarning raises": "warnings.showwarning = lambda *_, **__: 1 / 0",
    "stderr is closed": "sys.stderr.close()",
    "stdout is closed": "sys.stdout.close()",
    "stdout is a full disk": "sys.stdout = open('/dev/full', 'w'); print('x')",
    "no streams": "sys.stdout = sys.stderr = None",
    "handlers exit": "import logging; logging.Handler.handle = lambda *_: sys.exit(0)",
}
FAILING = "engine = make_engine(root, fs); fail_b(); commit(engine, 'a'); commit(engine, 'b'); "


def _endings() -> dict[str, tuple[list[str], str]]:
    found = {f"a failure, {name}": (["1", "a"], FAILING + code) for name, code in MUTED.items()}
    for part in TOLD.split("\n## ")[1:]:
        head, _, code = part.partition("\n")
        name, *wanted = (field.strip() for field in head.split("|"))
        found[name] = (wanted, code)
    return found


ENDINGS = _endings()


@pytest.mark.leaves_staging
@pytest.mark.parametrize("name", ENDINGS)
def test_an_ending(tmp_path: Path, name: str) -> None:
    (status, *wanted), code = ENDINGS[name]
    done = run_python("-W", "always", "-c", HEAD.format(package=str(ROOT), root=str(tmp_path / "run")) + code)
    # An interrupt that ends the interpreter is seen as the signal, or as a shell tells it.
    codes = {-2, 130} if status == "-2" else {int(status)}
    assert done.returncode in codes, (done.returncode, done.stdout, done.stderr)
    catalog = Catalog(tmp_path / "run")
    found = [tag for tag in catalog.tags() if catalog.verify(tag).ok]
    tags = wanted[0].split() if wanted else []
    # What was never reported may be there, whole, or not.
    assert set(tags) <= set(found) <= {*tags, "b"}, done.stderr
    for word in wanted[1:]:
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
    done = run_python("-c", script)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[0]", "")
