"""Executors, lanes, slots and outcomes."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
import threading
from concurrent.futures import Future

import pytest

from async_ckpt.errors import TransactionStateError
from async_ckpt.threads.executor import BACKGROUND_NICENESS, DaemonExecutor
from async_ckpt.writer.lane import Lane, Outcome, Slots, ended

from .fakes import TIMEOUT_S, Gate


@pytest.fixture
def executor():
    made = DaemonExecutor("async-ckpt-test", 2, niceness=BACKGROUND_NICENESS)
    yield made
    made.shutdown(wait=True)


def test_threads_are_daemons_and_nice(executor):
    def look() -> tuple[bool, int]:
        return threading.current_thread().daemon, os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    daemon, niceness = executor.submit(look).result(TIMEOUT_S)
    assert daemon
    if sys.platform == "linux":
        assert niceness == min(19, os.getpriority(os.PRIO_PROCESS, 0) + BACKGROUND_NICENESS)


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


async def test_a_lane_is_idle_only_when_its_threads_have_left(executor):
    lane, gate, idle = Lane(executor, None, ""), Gate(), threading.Event()
    waiting = asyncio.get_running_loop().run_in_executor(lane, gate)
    gate.wait_inside(1)
    waiting.cancel()
    lane.on_idle(idle.set)
    assert not lane.is_idle
    assert lane.oldest() is not None
    assert not idle.is_set()
    gate.open()
    assert idle.wait(TIMEOUT_S)
    assert lane.is_idle


async def test_cancelling_a_wait_leaves_the_future_alone():
    future: Future[int] = Future()
    waiting = asyncio.ensure_future(ended(future))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    future.set_result(1)
    assert await ended(future) == 1


async def test_slots_are_handed_over_in_order_and_survive_cancelled_waiters():
    slots = Slots(1)
    await slots.acquire()
    order: list[int] = []

    async def take(k: int) -> None:
        await slots.acquire()
        order.append(k)
        slots.release()

    tasks = [asyncio.ensure_future(take(k)) for k in range(4)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    slots.release()
    # Handed to the second, which is cancelled in the same round: it must go on to the third.
    tasks[1].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [2, 3]
    await asyncio.wait_for(slots.acquire(), TIMEOUT_S)


def test_an_outcome_resolves_once_and_cannot_be_cancelled():
    outcome: Outcome[int] = Outcome()
    assert not outcome.cancel()
    outcome.resolve(1, None)
    outcome.resolve(None, ValueError())
    assert outcome.result(0) == 1
