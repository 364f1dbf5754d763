"""The writer's loop: what runs on it is told of, whoever is interrupted while asking."""

from __future__ import annotations

import pytest

from async_ckpt.errors import TransactionStateError
from async_ckpt.threads.loop import LoopThread


async def nothing() -> None:
    pass


def test_a_signal_handler_that_interrupted_run_can_wait_for_the_loop():
    thread = LoopThread("test-loop", on_death=lambda error: None, on_undrained=lambda: None)
    wake, handled = thread.loop.call_soon_threadsafe, []

    def wake_and_be_interrupted(callback, *arguments):
        wake(callback, *arguments)
        if not handled:
            # As a handler of a signal that arrives here: on this thread, inside `run`. The second of two runs ends
            # only when the loop has let go of the first.
            handled.append(True)
            for _ in range(2):
                thread.run(nothing()).result(10)

    thread.loop.call_soon_threadsafe = wake_and_be_interrupted
    thread.start()
    try:
        thread.run(nothing()).result(10)
    finally:
        thread.stop()
        thread.join(10)
    assert thread.runs() == []


@pytest.mark.parametrize("num_runs", [1, 3])
def test_what_is_asked_for_while_the_loop_is_being_stopped_resolves(num_runs):
    thread = LoopThread("test-loop", on_death=lambda error: None, on_undrained=lambda: None)
    # The loop finds the requests and the stop in one turn: a task is made of each, and none has begun.
    outcomes = [thread.run(nothing()) for _ in range(num_runs)]
    thread.stop()
    thread.start()
    for outcome in outcomes:
        assert isinstance(outcome.exception(10), TransactionStateError)
    assert thread.join(10)
    assert thread.runs() == []
    with pytest.raises(TransactionStateError, match="stopped"):
        thread.run(nothing())
    assert thread.loop.is_closed()
