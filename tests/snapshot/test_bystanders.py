"""Which threads may be inside an operation: those that compute in somebody's code, and no others."""

from __future__ import annotations

import concurrent.futures
import ctypes
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from async_ckpt.snapshot import bystanders as bystanders_module
from async_ckpt.snapshot.bystanders import Bystanders
from tests.support.stepping import Doing, until

_libc = ctypes.CDLL(None)


@contextmanager
def computing() -> Iterator[Callable[[], None]]:
    """A thread inside one call that computes and does not hold the GIL; the value ends that call."""
    lock = (ctypes.c_int * 2)()
    _libc.pthread_spin_init(lock, 0)
    _libc.pthread_spin_lock(lock)
    entered, held = threading.Event(), threading.Event()

    def compute() -> None:
        entered.set()
        _libc.pthread_spin_lock(lock)
        held.wait()

    doing = Doing(compute)
    entered.wait()
    until(lambda: Bystanders().any_inside)
    try:
        yield lambda: _libc.pthread_spin_unlock(lock) and None
    finally:
        _libc.pthread_spin_unlock(lock)
        held.set()
        doing.result()


def test_a_thread_is_inside_until_it_goes_on() -> None:
    with computing() as let_go:
        bystanders = Bystanders()
        assert bystanders.any_inside
        bystanders.wait(0.02, is_settled=lambda: False)
        assert bystanders.any_inside
        let_go()
        bystanders.wait(60, is_settled=lambda: False)
        assert not bystanders.any_inside


def test_the_wait_ends_when_all_is_said() -> None:
    with computing():
        Bystanders().wait(3600, is_settled=lambda: True)


def test_a_thread_that_has_ended_is_not_inside() -> None:
    with computing():
        bystanders = Bystanders()
    assert not bystanders.any_inside


def test_a_thread_that_sleeps_is_not_inside() -> None:
    read, write = socket.socketpair()
    with read, write:
        doing = Doing(lambda: _libc.read(read.fileno(), ctypes.create_string_buffer(1), 1))
        bystanders = Bystanders()
        bystanders.wait(60, is_settled=lambda: False)
        assert not bystanders.any_inside and not doing.ended
        write.send(b"x")
        doing.result()


def test_threads_that_wait_in_the_library_are_not_even_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    event = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        waiting = [executor.submit(event.wait), executor.submit(threading.Thread.join, threading.main_thread(), 0.0)]
        waiting[1].result()
        until(lambda: not Bystanders()._inside)
        monkeypatch.setattr("async_ckpt.snapshot.bystanders.running_threads", lambda: pytest.fail("was asked for"))
        assert not Bystanders().any_inside
        event.set()


def test_where_the_system_says_nothing_of_its_threads_sleeping_ones_may_be_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("async_ckpt.snapshot.bystanders.running_threads", lambda: None)
    with computing():
        bystanders = Bystanders()
        assert [bystanders.any_inside for _ in range(10)] == [True] * 10


def test_a_thread_that_sleeps_is_outside_however_busy_others_are() -> None:
    """A heartbeat in user code beside a decoder's threads made every save wait for the time limit."""
    with computing():
        doing = Doing(lambda: _libc.usleep(50_000) and None)
        bystanders = Bystanders()
        until(lambda: bystanders.any_inside is True and len(bystanders._inside) == 1)
        doing.result()


def test_a_thread_that_sleeps_at_a_lock_beside_busy_ones_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It might be a barrier, and the busy ones compute for it."""
    monkeypatch.setattr(bystanders_module, "running_threads", lambda: frozenset([-1]))
    jobs: queue.SimpleQueue[object] = queue.SimpleQueue()
    doing = Doing(lambda: jobs.get())
    until(lambda: Bystanders()._inside)
    bystanders = Bystanders()
    assert [bystanders.any_inside for _ in range(10)] == [True] * 10
    monkeypatch.setattr(bystanders_module, "_SLEEP_BESIDE_OTHERS_S", 0.0)
    assert not bystanders.any_inside and not Bystanders()._inside
    jobs.put(None)
    doing.result()


def test_a_load_of_sharded_state_changes_tensors() -> None:
    from async_ckpt.integrations.dcp import reader

    assert not bystanders_module._is_harmless(reader.DcpReader.read_data.__code__)
    assert bystanders_module._is_harmless(Bystanders.wait.__code__) and bystanders_module._is_harmless(threading.Event.wait.__code__)
    assert not bystanders_module._is_harmless(threading.Thread.run.__code__)
