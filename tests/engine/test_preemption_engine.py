"""The engine's side of preemption: its safe points, and what it refuses."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.errors import ConfigError, TransactionStateError


@pytest.fixture
def engine(tmp_path):
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=64 << 10) as made:
        yield made


def commit(engine: AsyncCheckpointEngine, tag: str) -> None:
    engine.create(tag)
    engine.save({"x": torch.ones(10)}, "x.pt")
    engine.commit(tag)


def send() -> None:
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.wide
def test_commit_is_a_safe_point_but_create_and_save_are_not(engine):
    saved = []
    engine.on_preemption((signal.SIGUSR1,), save=lambda: (saved.append(engine.tags()), commit(engine, "last")))
    send()
    engine.create("step-1")
    engine.save({"x": torch.ones(3)}, "x.pt")
    assert engine.preempted
    assert saved == []
    engine.commit("step-1")
    # What was pending is durable before the hook runs, and the hook's own commit when it returns.
    assert saved == [["step-1"]]
    assert engine.tags() == ["step-1", "last"]
    assert engine.preemption_outcome.committed == ("step-1", "last")
    assert engine.poll_preemption()


def test_a_hook_that_saves_the_tag_just_committed_is_satisfied(engine):
    engine.on_preemption((signal.SIGUSR1,), save=lambda: commit(engine, "step-1"))
    send()
    commit(engine, "step-1")
    assert engine.preemption_outcome.ok
    assert engine.tags() == ["step-1"]


def test_a_second_workers_death_does_not_end_the_last_save(tmp_path):
    """torch raises each death wherever the main thread is, from a handler of SIGCHLD."""

    def raise_death(signum, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    def save():
        os.kill(os.getpid(), signal.SIGCHLD)
        commit(engine, "last")

    before = signal.signal(signal.SIGCHLD, raise_death)
    try:
        with (  # noqa: PT012
            pytest.raises(RuntimeError, match="DataLoader worker"),
            AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine,
        ):
            engine.on_preemption((signal.SIGUSR1,), save=save)
            send()
            os.kill(os.getpid(), signal.SIGCHLD)
        assert signal.getsignal(signal.SIGCHLD) is raise_death
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert engine.preemption_outcome.committed == ("last",)


def test_leaving_the_block_saves_once_more(tmp_path):
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        engine.on_preemption((signal.SIGUSR1,), save=lambda: commit(engine, "last"))
        send()
    assert engine.preemption_outcome.committed == ("last",)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_leaving_by_an_exception_saves_nothing_half_done(tmp_path):
    with pytest.raises(KeyError), AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:  # noqa: PT012
        engine.on_preemption((signal.SIGUSR1,), save=lambda: pytest.fail("saved half a step"))
        commit(engine, "step-1")
        send()
        raise KeyError
    assert engine.preemption_outcome.hook_error is None
    assert engine.tags() == ["step-1"]


def test_the_engine_is_closed_when_the_hook_fails_at_the_end(tmp_path):
    def fail() -> None:
        raise RuntimeError("hook")

    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20)
    engine.on_preemption((signal.SIGUSR1,), save=fail)
    send()
    with pytest.raises(RuntimeError, match="hook"):
        engine.close()
    with pytest.raises(TransactionStateError, match="closed"):
        engine.create("x")
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_without_preemption_the_questions_have_answers(engine):
    assert not engine.preempted
    assert not engine.poll_preemption()
    assert engine.preemption_outcome is None


def test_refusals_name_the_fix(engine):
    with pytest.raises(ConfigError, match="SIGKILL"):
        engine.on_preemption((signal.SIGKILL,))
    raised = []

    def elsewhere() -> None:
        try:
            engine.on_preemption()
        except TransactionStateError as error:
            raised.append(str(error))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert "main thread" in raised[0]
    engine.on_preemption((signal.SIGUSR1,))
    with pytest.raises(TransactionStateError, match="already"):
        engine.on_preemption((signal.SIGUSR1,))
