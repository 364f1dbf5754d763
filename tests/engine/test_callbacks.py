"""The user's code: it runs on a thread that nothing waits for, and may call the engine."""

from __future__ import annotations

import asyncio
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, CheckpointError, PendingCommit
from async_ckpt.metrics import Observer
from async_ckpt.retention import RetentionPolicy
from tests.support.faulty_filesystem import FaultyFileSystem
from tests.support.insides import arena_of
from tests.support.stepping import saved

TIMEOUT_S = 60


class Observing(Observer):
    def __init__(self, act: Any) -> None:
        self.act = act

    def on_commit(self, metrics: Any, error: BaseException | None) -> None:
        self.act(metrics.tag)


def save_that_waits_for_memory(root: Path, meet: Any, met: threading.Event, **options: Any) -> list[str]:
    """Save a second checkpoint while the first one's commit holds all staging memory; `meet(engine, pending)` in
    between.
    """
    gate = threading.Event()
    fs = FaultyFileSystem()
    fs.before = lambda op: gate.wait(TIMEOUT_S) if op.name == "pwrite" and ".first." in op.path else None
    state = {"x": torch.zeros(1 << 14)}
    with AsyncCheckpointEngine(
        root, staging_bytes=64 << 10, chunk_bytes=64 << 10, filesystem=fs, backpressure_timeout_s=TIMEOUT_S, **options
    ) as engine:
        engine.create("first")
        engine.save({"x": torch.zeros(100)}, "x.pt")
        meet(engine, engine.commit("first"))
        engine.create("second")
        threading.Timer(0.2, gate.set).start()
        engine.save(state, "x.pt")
        assert arena_of(engine).num_chunks == 1
        engine.commit("second").result(TIMEOUT_S)
        assert met.wait(TIMEOUT_S)
        return sorted(engine.tags())


@pytest.mark.wide
def test_a_callback_that_creates_while_a_save_waits_for_memory(tmp_path: Path) -> None:
    created = threading.Event()

    def create(engine: Any) -> None:
        engine.create("third")
        engine.abort("third")
        created.set()

    def meet(engine: Any, pending: Any) -> None:
        pending.add_done_callback(lambda _: create(engine))

    assert save_that_waits_for_memory(tmp_path, meet, created) == ["first", "second"]


def test_an_observer_that_creates_while_a_save_waits_for_memory(tmp_path: Path) -> None:
    engines: list[Any] = []
    created = threading.Event()

    def act(tag: str) -> None:
        if tag == "first":
            engines[0].create("third")
            engines[0].abort("third")
            created.set()

    options = {"observers": (Observing(act),)}
    tags = save_that_waits_for_memory(tmp_path, lambda engine, _: engines.append(engine), created, **options)
    assert tags == ["first", "second"]


def test_neither_raising_nor_exiting_ends_the_writer(tmp_path: Path) -> None:
    told: list[str] = []
    observers = (Observing(lambda _: sys.exit(3)), Observing(told.append))
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, observers=observers) as engine:
        for tag in ("a", "b"):
            pending = saved(engine, {"x": torch.zeros(10)}, tag, path="x.pt")
            pending.add_done_callback(lambda _: sys.exit(4))
            assert pending.result(TIMEOUT_S) == tag
    assert told == ["a", "b"]


def test_closing_tells_what_is_still_to_be_told_and_may_be_done_by_a_callback(tmp_path: Path) -> None:
    closed = threading.Event()
    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20)
    engine.create("a")
    pending = engine.commit("a")
    pending.add_done_callback(lambda _: (engine.close(), closed.set()))
    engine.close()
    assert closed.wait(TIMEOUT_S)
    assert pending.result(0) == "a"
    after: list[Any] = []
    pending.add_done_callback(after.append)
    assert after == [pending]


def test_a_retention_policy_that_exits_ends_no_writer(tmp_path: Path) -> None:
    class Exits(RetentionPolicy):
        def kept(self, *_: Any) -> Any:
            sys.exit(3)

    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, retention=Exits())
    engine.create("a")
    assert engine.commit("a").result(TIMEOUT_S) == "a"
    told = []
    for tag in ("b", "c"):
        try:
            engine.create(tag)
            engine.commit(tag).result(TIMEOUT_S)
        except CheckpointError as error:
            told.append(error)
    try:
        engine.close()
    except CheckpointError as error:
        told.append(error)
    assert told and all("SystemExit" in str(error) for error in told)


def test_no_thread_is_left_when_close_returns(tmp_path: Path) -> None:
    for k in range(3):
        AsyncCheckpointEngine(tmp_path / str(k), staging_bytes=16 << 20).close()
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("async-ckpt")] == []


def test_a_callback_that_blocks_keeps_nobody_from_learning_of_a_commit(tmp_path: Path) -> None:
    gate = threading.Event()
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        for tag in ("a", "b"):
            pending = saved(engine, {"x": torch.ones(10)}, tag, path="x.pt")
            pending.add_done_callback(lambda _: gate.wait(TIMEOUT_S))
            assert pending.result(TIMEOUT_S / 2) == tag
        assert asyncio.run(asyncio.wait_for(_result_of(pending), TIMEOUT_S / 2)) == "b"
        gate.set()


async def _result_of(pending: PendingCommit) -> str:
    return await pending
