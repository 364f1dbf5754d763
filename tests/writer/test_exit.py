"""Closing, forking and leaving the process, with and without a write that never returns."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from async_ckpt.errors import BackpressureTimeout, TransactionStateError

from .fakes import TIMEOUT_S, Gate, Source, seal

ROOT = Path(__file__).parents[2]


@pytest.mark.wide
def test_close_waits_for_what_was_submitted(make_pool, fs):
    pool = make_pool()
    source = Source(4 * 4096, 4096)
    file = source.write(pool)
    pool.close(TIMEOUT_S)
    assert file.done.exception(0) is None
    pool.close(TIMEOUT_S)
    with pytest.raises(TransactionStateError, match="closed"):
        pool.open_file("g", size_bytes=1, seal=seal)
    with pytest.raises(TransactionStateError):
        pool.copier.submit(lambda: None)


def test_close_gives_up_files_that_lack_chunks(make_pool):
    pool = make_pool()
    source = Source(2 * 4096, 4096)
    file = pool.open_file("f", size_bytes=source.size_bytes, seal=seal)
    file.submit(source.chunks[0])
    pool.close(TIMEOUT_S)
    assert isinstance(file.done.exception(0), TransactionStateError)
    file.submit(source.chunks[1])
    source.assert_released_once()


def test_close_on_a_stuck_write_is_bounded_and_says_what_it_waits_for(make_pool, fs):
    gate = Gate()
    fs.on["write"] = lambda path, offset: gate() if offset == 4096 else None
    pool = make_pool()
    source = Source(2 * 4096, 4096)
    file = source.write(pool, "stuck")
    gate.wait_inside(1)
    with pytest.raises(BackpressureTimeout, match=r"write of 4096 bytes at offset 4096 of 'stuck'"):
        pool.close(0.05)
    gate.open()
    pool.close(TIMEOUT_S)
    assert file.done.exception(0) is None


def test_close_from_the_loop_is_refused(make_pool):
    pool = make_pool()

    async def close() -> None:
        pool.close(1)

    assert isinstance(pool.run(close()).exception(TIMEOUT_S), TransactionStateError)


def test_no_thread_or_descriptor_stays_after_close(make_pool):
    threads, descriptors = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        pool = make_pool()
        source = Source(4096, 4096)
        source.write(pool).done.result(TIMEOUT_S)
        pool.close(TIMEOUT_S)
    assert threading.active_count() == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


CALLS = {
    "open_file": lambda pool, file, source: pool.open_file("x", size_bytes=1, seal=seal),
    "submit": lambda pool, file, source: file.submit(source.chunks[0]),
    "abort": lambda pool, file, source: file.abort(ValueError()),
    "done": lambda pool, file, source: file.done.result(1),
    "copy": lambda pool, file, source: pool.copier.submit(lambda: None),
    "waiting_for": lambda pool, file, source: pool.waiting_for(),
    "close": lambda pool, file, source: pool.close(1),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_is_refused_by_every_call_and_harms_nothing(make_pool, fs):
    gate = fs.on["write"] = Gate()
    pool = make_pool()
    source = Source(4 * 4096, 4096)
    file = source.write(pool)
    gate.wait_inside(3)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lines = []
        for name, call in CALLS.items():
            try:
                call(pool, file, source)
                lines.append(f"{name}: allowed")
            except TransactionStateError as error:
                named = str(os.getpid()) in str(error) and str(os.getppid()) in str(error)
                lines.append(f"{name}: {'refused' if named else error}")
        os.write(writer, "\n".join(lines).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answers = pipe.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0
    assert answers == [f"{name}: refused" for name in CALLS]
    gate.open()
    file.done.result(TIMEOUT_S)
    source.assert_released_once()


SCRIPT = """
import atexit, sys, threading
sys.path.insert(0, {root!r})
from async_ckpt.errors import BackpressureTimeout
from async_ckpt.writer.pool import WriterPool
from tests.writer.fakes import FakeFileSystem, Gate, Source, seal

fs = FakeFileSystem()
gate = Gate()
pool = WriterPool(fs, num_writers=2, io_mode="direct")
source = Source(4 * 4096, 4096)
{body}
"""

STUCK = """
fs.on["write"] = lambda *_: threading.Event().wait()
reached = threading.Event()
fs.on["write"] = lambda *_: (reached.set(), threading.Event().wait())
source.write(pool)
assert reached.wait(20)
print("leaving", flush=True)
"""

DRAINED = """
fs.on["write"] = gate
file = pool.open_file("f", size_bytes=source.size_bytes, seal=seal)

def drain():
    source.submit(file)
    gate.open()
    pool.close(20)
    print("written", bytes(fs.files["f"].data) == source.data, flush=True)

atexit.register(drain)
"""

BOUNDED = (
    STUCK
    + """
def close():
    try:
        pool.close(0.05)
    except BackpressureTimeout as error:
        print("bounded", flush=True)

atexit.register(close)
"""
)


@pytest.mark.parametrize(
    ("body", "says"),
    [(STUCK, "leaving"), (DRAINED, "written True"), (BOUNDED, "leaving\nbounded")],
    ids=["stuck", "drained", "bounded"],
)
def test_a_real_process_ends(body, says):
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", SCRIPT.format(root=str(ROOT), body=body)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, says, "")
