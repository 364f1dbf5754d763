"""`Lock`: whatever a signal handler raises and when, nobody has them afterwards."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any

import pytest

from async_ckpt.threads import locks


class Struck(BaseException):
    """What the handler raises."""


def is_held(lock: Any) -> bool:
    """By anybody, seen from another thread: the locks are re-entrant."""
    got: list[bool] = []

    def try_it() -> None:
        got.append(lock.acquire(blocking=False))
        if got[0]:
            lock.release()

    thread = threading.Thread(target=try_it)
    thread.start()
    thread.join()
    return not got[0]


@pytest.mark.wide
def test_real_signals_leave_it_free() -> None:
    def strike(number: int, frame: FrameType | None) -> None:
        raise Struck

    before = signal.signal(signal.SIGALRM, strike)
    try:
        for _ in range(300):
            lock = locks.Lock()
            try:
                # Again after a while: one that strikes in a finalizer ends nothing.
                signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.5)
                while True:
                    with lock:
                        pass
            except Struck:
                signal.setitimer(signal.ITIMER_REAL, 0)
                assert not is_held(lock)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_struck_at_every_step() -> None:
    """Each point at which the interpreter looks for signals while the lock is entered, held and left."""
    num_steps, k = 1, 0
    while k < num_steps:
        lock = locks.Lock()
        num_steps = 0

        def strike(frame: FrameType, event: str, arg: object, k: int = k) -> None:
            nonlocal num_steps
            num_steps += event in ("call", "c_return")
            if num_steps > k:
                raise Struck

        try:
            sys.setprofile(strike)
            with lock:
                len("")
        except Struck:
            sys.setprofile(None)
            assert not is_held(lock), f"held after step {k}"
            num_steps = k + 2
        finally:
            sys.setprofile(None)
        k += 1
    assert k > 3


def test_an_interrupted_wait_for_the_lock_leaves_its_holder_in_peace() -> None:
    lock = locks.Lock()
    has_it, may_go = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            has_it.set()
            may_go.wait()

    def strike(number: int, frame: FrameType | None) -> None:
        raise Struck

    holder = threading.Thread(target=hold)
    holder.start()
    has_it.wait()
    before = signal.signal(signal.SIGALRM, strike)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(Struck), lock:
            pytest.fail("entered while another thread has it")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert is_held(lock)
    may_go.set()
    holder.join()
    assert not is_held(lock)


def test_reentered_and_struck_inside_it_stays_with_the_outer_body() -> None:
    lock = locks.Lock()
    with lock:
        with pytest.raises(Struck), lock:
            raise Struck
        assert is_held(lock)
    assert not is_held(lock)


def test_its_holder_waits_for_another_ones_word() -> None:
    condition = locks.Lock()
    said: list[str] = []

    def listen() -> None:
        with condition:
            while not said:
                assert condition.wait(30)
            said.append("heard")
            condition.notify_all()

    listener = threading.Thread(target=listen)
    listener.start()
    with condition:
        said.append("word")
        condition.notify_all()
        while len(said) < 2:
            assert condition.wait(30)
        assert not condition.wait(0.0)
    listener.join()
    assert not is_held(condition)


def test_what_must_end_is_waited_for_through_every_interrupt() -> None:
    calls: list[int] = []

    def wait() -> None:
        calls.append(1)
        if len(calls) < 4:
            raise Struck(len(calls))

    with pytest.raises(Struck, match="3"):
        locks.uninterrupted(wait)
    assert len(calls) == 4


def test_what_fails_every_time_is_raised() -> None:
    def wait() -> None:
        raise OSError("for good")

    with pytest.raises(OSError, match="for good"):
        locks.uninterrupted(wait)
