"""A child that is forked in the middle of a save: every call on its parent's engine refuses at once."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, TransactionStateError
from tests.support.faulty_filesystem import FaultyFileSystem
from tests.support.insides import commits_of
from tests.support.stepping import saved

TIMEOUT_S = 60


def leave(engine: Any) -> None:
    with engine:
        pass


async def wait_for(pending: Any) -> None:
    await pending


CALLS: dict[str, Callable[[Any, Any], object]] = {
    "create": lambda engine, pending: engine.create("c"),
    "makedirs": lambda engine, pending: engine.makedirs("d"),
    "save": lambda engine, pending: engine.save({}, "y.pt"),
    "commit": lambda engine, pending: engine.commit("second"),
    "abort": lambda engine, pending: engine.abort("second"),
    "load": lambda engine, pending: engine.load("first/x.pt"),
    "guard": lambda engine, pending: engine.guard(),
    "prewarm": lambda engine, pending: engine.prewarm(),
    "pending": lambda engine, pending: engine.pending(),
    "on_preemption": lambda engine, pending: engine.on_preemption(),
    "close": lambda engine, pending: engine.close(),
    "leaving the block": lambda engine, pending: leave(engine),
    "result": lambda engine, pending: pending.result(),
    "exception": lambda engine, pending: pending.exception(),
    "done": lambda engine, pending: pending.done(),
    "add_done_callback": lambda engine, pending: pending.add_done_callback(print),
    "await": lambda engine, pending: asyncio.run(wait_for(pending)),
}


def answers_of_a_child(engine: Any, pending: Any) -> list[str]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Whatever hangs is killed.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        for name, call in CALLS.items():
            try:
                call(engine, pending)
                answer = "allowed"
            except TransactionStateError as error:
                answer = "refused" if str(os.getpid()) in str(error) else str(error)
            os.write(writer, f"{name}: {answer}\n".encode())
        engine.wait_snapshot()
        repr(pending)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answers = pipe.read().splitlines()
    assert os.waitpid(child, 0)[1] == 0, answers
    return answers


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_child_forked_in_the_middle_of_a_save_is_refused_by_every_call(tmp_path: Path) -> None:
    gate, reached = threading.Event(), threading.Event()
    fs = FaultyFileSystem()

    def hold(op: Any) -> None:
        if op.name == "pwrite" and ".first." in op.path:
            reached.set()
            gate.wait(TIMEOUT_S)

    fs.before = hold
    with AsyncCheckpointEngine(tmp_path, staging_bytes=64 << 10, chunk_bytes=64 << 10, filesystem=fs) as engine:
        pending = saved(engine, {"x": torch.zeros(100)}, "first", path="x.pt")
        assert reached.wait(TIMEOUT_S)
        engine.create("second")
        saving = threading.Thread(target=engine.save, args=({"x": torch.zeros(1 << 14)}, "x.pt"))
        saving.start()
        # It holds the engine's lock while it waits for staging memory, as `pending` holds all of that.
        while commits_of(engine).lock.acquire(blocking=False):
            commits_of(engine).lock.release()
            os.sched_yield()
        answers = answers_of_a_child(engine, pending)
        gate.set()
        saving.join()
        engine.commit("second").result(TIMEOUT_S)
        pending.result(TIMEOUT_S)
        assert engine.tags() == ["first", "second"]
    assert answers == [f"{name}: refused" for name in CALLS]
