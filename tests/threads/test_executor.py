"""Executors and outcomes."""

from __future__ import annotations

import ctypes
import os
import sys
import threading

import pytest

from async_ckpt.errors import TransactionStateError
from async_ckpt.threads import executor as executor_module
from async_ckpt.threads.executor import DaemonExecutor, lower_priority
from async_ckpt.threads.outcome import Outcome
from tests.writer.fakes import TIMEOUT_S, Gate


@pytest.fixture
def executor():
    made = DaemonExecutor("async-ckpt-test", 2, on_start=lower_priority)
    yield made
    made.shutdown(wait=True)


@pytest.mark.wide
def test_threads_are_daemons_and_nice(executor):
    def look() -> tuple[bool, int]:
        return threading.current_thread().daemon, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    daemon, niceness = executor.submit(look).result(TIMEOUT_S)
    assert daemon
    if sys.platform == "linux":
        assert niceness == min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)


def test_any_exception_reaches_the_waiter_and_the_thread_lives_on(executor):
    def leave() -> None:
        raise SystemExit(3)

    assert isinstance(executor.submit(leave).exception(TIMEOUT_S), SystemExit)
    assert executor.submit(lambda: 1).result(TIMEOUT_S) == 1


def test_shutdown_runs_what_is_queued(executor):
    gate = Gate()
    holding = [executor.submit(gate) for _ in range(2)]
    queued = executor.submit(lambda: "ran")
    executor.shutdown(wait=False)
    with pytest.raises(TransactionStateError):
        executor.submit(lambda: None)
    gate.open()
    assert queued.result(TIMEOUT_S) == "ran"
    assert all(future.exception(TIMEOUT_S) is None for future in holding)


def test_shutdown_can_fail_what_is_queued(executor):
    gate = Gate()
    for _ in range(2):
        executor.submit(gate)
    gate.wait_inside(2)
    queued = executor.submit(lambda: "ran")
    executor.shutdown(wait=False, cancel_futures=True)
    assert isinstance(queued.exception(TIMEOUT_S), TransactionStateError)
    assert not executor.join(0)
    gate.open()
    assert executor.join(TIMEOUT_S)


def test_a_killed_thread_fails_what_is_queued():
    executor = DaemonExecutor("async-ckpt-test", 1)
    ident = executor.submit(threading.get_ident).result(TIMEOUT_S)
    gate = Gate()
    running = executor.submit(gate)
    gate.wait_inside(1)
    queued = executor.submit(lambda: "ran")
    done = threading.Event()
    running.add_done_callback(lambda _: done.wait(TIMEOUT_S))
    gate.open()
    running.result(TIMEOUT_S)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(SystemExit))
    done.set()
    assert isinstance(queued.exception(TIMEOUT_S) or executor.refusal, TransactionStateError)
    assert executor.join(TIMEOUT_S)
    with pytest.raises(TransactionStateError):
        executor.submit(lambda: None)


def test_an_outcome_resolves_once():
    outcome: Outcome[int] = Outcome()
    outcome.resolve(1, None)
    outcome.resolve(None, ValueError())
    assert outcome.result(0) == 1


def test_an_interrupt_while_threads_start_leaves_none_behind(monkeypatch):
    start, started = executor_module.start_thread, []

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        if len(started) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(executor_module, "start_thread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        DaemonExecutor("async-ckpt-test", 3)
    for thread in started:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
