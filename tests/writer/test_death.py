"""The pool's loop, tasks or executors die in every way: all waiters learn the cause, nothing hangs, memory comes
back.
"""

from __future__ import annotations

import asyncio
import ctypes
import threading

import pytest

from async_ckpt.errors import CheckpointError, WriteError
from tests.support.insides import thread_of

from .fakes import TIMEOUT_S, Gate, Source, seal

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def stop_loop(pool) -> None:
    thread_of(pool).call(thread_of(pool).loop.stop)


def raise_in_callback(pool) -> None:
    def callback() -> None:
        raise ZeroDivisionError("in a callback")

    thread_of(pool).call(callback)


def raise_in_coroutine(pool) -> None:
    async def bad() -> None:
        raise SystemExit("in a coroutine")

    assert isinstance(pool.run(bad()).exception(TIMEOUT_S), SystemExit)


def inject_into_thread(pool) -> None:
    """The loop's thread gets an exception from outside, wherever it is."""
    thread = thread_of(thread_of(pool)).ident
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(SystemExit))
    thread_of(pool).call(lambda: None)


DEATHS = [stop_loop, raise_in_callback, raise_in_coroutine, inject_into_thread]


def assert_dead(pool) -> None:
    with pytest.raises(WriteError):
        pool.open_file("late", size_bytes=1, seal=seal)
    with pytest.raises(WriteError):
        pool.run(asyncio.sleep(0))


@pytest.mark.wide
@pytest.mark.parametrize("kill", DEATHS)
def test_death_fails_everything_at_once_and_gives_memory_back_later(make_pool, fs, kill):
    gate = fs.on["write"] = Gate()
    pool = make_pool(num_writers=3)
    told: list[BaseException] = []
    pool.death.when_done(lambda death: told.append(death.failure()))
    sources = [Source(8 * 4096, 4096) for _ in range(2)]
    files = [source.write(pool, name) for name, source in zip("ab", sources, strict=True)]
    unfed = pool.open_file("unfed", size_bytes=4096, seal=seal)
    waiting = pool.run(asyncio.sleep(3600))
    gate.wait_inside(3)
    kill(pool)
    for future in (*(file.done for file in (*files, unfed)), waiting):
        assert isinstance(future.exception(TIMEOUT_S), WriteError)
    # Three writes are still in their threads: their memory must not have been given back.
    assert sum(count == 0 for source in sources for count in source.releases.values()) >= 3
    assert_dead(pool)
    gate.open()
    for source in sources:
        source.assert_released_once()
    pool.close(TIMEOUT_S)
    assert all(file.num_closed == 1 for file in fs.files.values())
    assert told == [files[0].done.exception()]
    pool.death.when_done(lambda death: told.append(death.failure()))
    assert len(told) == 2


@pytest.mark.parametrize("kill", DEATHS)
def test_death_of_an_idle_pool(make_pool, kill):
    pool = make_pool()
    died = threading.Event()
    pool.death.when_done(lambda _: died.set())
    kill(pool)
    assert died.wait(TIMEOUT_S)
    assert_dead(pool)


def test_chunks_for_a_dead_pool_come_back(make_pool):
    pool = make_pool()
    source = Source(4 * 4096, 4096)
    file = pool.open_file("f", size_bytes=source.size_bytes, seal=seal)
    stop_loop(pool)
    assert isinstance(file.done.exception(TIMEOUT_S), WriteError)
    source.submit(file)
    source.assert_released_once()


def test_a_loop_that_is_stopped_again_and_again_still_gives_memory_back(make_pool, fs):
    gate = fs.on["write"] = Gate()
    pool = make_pool(num_writers=2)
    source = Source(4 * 4096, 4096)
    file = source.write(pool)
    gate.wait_inside(2)

    def stop_always() -> None:
        thread_of(pool).loop.stop()
        thread_of(pool).loop.call_soon(stop_always)

    thread_of(pool).call(stop_always)
    assert isinstance(file.done.exception(TIMEOUT_S), WriteError)
    assert thread_of(pool).join(TIMEOUT_S)
    assert not any(source.releases.values())
    gate.open()
    source.assert_released_once()


@pytest.mark.parametrize("at", ["opening", "writing", "waiting", "syncing", "unstarted"])
def test_all_tasks_cancelled(make_pool, fs, at):
    gate = Gate()
    fs.on[{"opening": "open", "writing": "write", "syncing": "fsync"}.get(at, "none")] = gate
    pool = make_pool()

    def cancel_all() -> None:
        for task in asyncio.all_tasks(thread_of(pool).loop):
            task.cancel()

    source = Source(4 * 4096, 4096)
    if at == "unstarted":
        # Both callbacks run in one round of the loop: the task is cancelled before its first step.
        held = Gate()
        thread_of(pool).call(held)
        held.wait_inside(1)
        file = source.write(pool)
        thread_of(pool).call(cancel_all)
        held.open()
    else:
        file = pool.open_file("f", size_bytes=source.size_bytes, seal=seal)
        for chunk in source.chunks[: 1 if at == "waiting" else 4]:
            file.submit(chunk)
        if at != "waiting":
            gate.wait_inside(1)
        thread_of(pool).call(cancel_all)
        thread_of(pool).call(cancel_all)
        gate.open()
    error = file.done.exception(TIMEOUT_S)
    assert isinstance(error, WriteError)
    assert isinstance(error.__cause__, asyncio.CancelledError)
    for chunk in source.chunks[1:] if at == "waiting" else ():
        file.submit(chunk)
    source.assert_released_once()
    again = Source(4096, 4096)
    again.write(pool, "g").done.result(TIMEOUT_S)


def test_a_cancelled_coroutine_is_an_error_of_our_tree(make_pool):
    pool = make_pool()
    held = Gate()
    thread_of(pool).call(held)
    held.wait_inside(1)
    waiting = pool.run(asyncio.sleep(3600))
    thread_of(pool).call(lambda: [task.cancel() for task in asyncio.all_tasks(thread_of(pool).loop)])
    held.open()
    assert isinstance(waiting.exception(TIMEOUT_S), WriteError)


@pytest.mark.parametrize("drop", [False, True])
def test_an_executor_that_is_shut_down(make_pool, fs, drop):
    gate = fs.on["write"] = Gate()
    pool = make_pool(num_writers=2)
    source = Source(8 * 4096, 4096)
    file = source.write(pool)
    more = pool.open_file("unfed", size_bytes=4096, seal=seal)
    gate.wait_inside(2)
    pool.disk.io.shutdown(wait=False, cancel_futures=drop)
    gate.open()
    late = Source(4096, 4096)
    late.submit(more)
    assert isinstance(more.done.exception(TIMEOUT_S), CheckpointError)
    late.assert_released_once()
    assert isinstance(file.done.exception(TIMEOUT_S), CheckpointError)
    source.assert_released_once()
    with pytest.raises(WriteError):
        pool.open_file("late", size_bytes=1, seal=seal)
