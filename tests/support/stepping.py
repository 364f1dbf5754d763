"""Threads that step and save, stopped where a test wants them: ordered by what they do, never by time."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, PendingCommit
from async_ckpt.snapshot.guard import Guard
from async_ckpt.snapshot.step_exclusion import StepExclusion

TIMEOUT_S = 60.0

_waiting: dict[str, Counter[int]] = {"turn": Counter(), "copies": Counter()}
"""How often each thread (by ident) is inside a wait. Another thread's frames cannot be walked safely while it runs."""


def _noted(wait: Callable[..., Any], threads: Counter[int]) -> Callable[..., Any]:
    @functools.wraps(wait)
    def noted(*args: Any) -> Any:
        thread = threading.get_ident()
        threads[thread] += 1
        try:
            return wait(*args)
        finally:
            threads[thread] -= 1

    return noted


@contextlib.contextmanager
def waits_noted() -> Iterator[None]:
    """Within the block, `waits_for` and what stands on it know who waits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepExclusion, "_wait", _noted(StepExclusion._wait, _waiting["turn"]))
        patch.setattr(Guard, "_wait_for", _noted(Guard._wait_for, _waiting["copies"]))
        yield


@pytest.fixture
def noted_waits() -> Iterator[None]:
    """`waits_noted`, for a test."""
    with waits_noted():
        yield


def saved(engine: AsyncCheckpointEngine, state: Any, tag: str = "t", *, path: str = "s.pt") -> PendingCommit:
    """`state`, saved as the one file of a checkpoint that is on its way."""
    engine.create(tag)
    engine.save(state, path)
    return engine.commit(tag)


def until(condition: Callable[[], object]) -> None:
    """Let the other threads run until `condition` holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        # Gives the GIL away, also to a thread that is about to ask for it.
        threading.Event().wait(0.0002)


def waits_for(what: str, thread: threading.Thread) -> bool:
    """Whether `thread` is inside the wait for its "turn", or for lazy "copies"."""
    return _waiting[what][thread.ident or 0] > 0


def is_blocked(thread: threading.Thread) -> bool:
    """Whether `thread` waits for its turn, or for lazy copies."""
    return waits_for("turn", thread) or waits_for("copies", thread)


class Doing:
    """Work on a thread of its own; its exception is raised by `result`."""

    def __init__(self, work: Callable[[], Any], name: str | None = None) -> None:
        self._work = work
        self._value: Any = None
        self._error: BaseException | None = None
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._value = self._work()
        except BaseException as error:  # noqa: BLE001 - `result` raises it
            self._error = error

    @property
    def ended(self) -> bool:
        return not self.thread.is_alive()

    def settle(self) -> Doing:
        """Until it has ended or is blocked."""
        until(lambda: self.ended or is_blocked(self.thread))
        return self

    @property
    def blocked(self) -> bool:
        return not self.ended and is_blocked(self.thread)

    def result(self) -> Any:
        self.thread.join(TIMEOUT_S)
        assert self.ended, "it hangs"
        if self._error is not None:
            raise self._error
        return self._value


class Gate:
    """A point that a thread passes only when it is told to; open until `close`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_open = True
        self._num_allowed = 0
        self.num_reached = 0

    def close(self) -> None:
        with self._changed:
            self._is_open, self._num_allowed = False, self.num_reached

    def open(self) -> None:
        with self._changed:
            self._is_open = True
            self._changed.notify_all()

    def let_one_pass(self) -> None:
        """The one that stands before it, or the next that comes."""
        with self._changed:
            self._num_allowed += 1
            self._changed.notify_all()

    @property
    def is_held(self) -> bool:
        """Somebody stands before it, and has not been told to pass."""
        return not self._is_open and self.num_reached > self._num_allowed

    def reach(self) -> None:
        with self._changed:
            self.num_reached += 1
            number = self.num_reached
            assert self._changed.wait_for(lambda: self._is_open or self._num_allowed >= number, TIMEOUT_S), (
                "nobody opened the gate"
            )


class GateGroup(dict[str, Any]):
    """A param group that stops torch's own `step` before it is worked on, when earlier groups are stepped."""

    def __init__(self, group: dict[str, Any], gate: Gate) -> None:
        super().__init__(group)
        self.gate = gate

    def __getitem__(self, key: str) -> Any:
        # What optimizers read first in each group, and nothing else outside of step does.
        if key == "maximize" and sys._getframe(1).f_code.co_name == "step":
            self.gate.reach()
        return super().__getitem__(key)


@contextlib.contextmanager
def gated(optimizer: torch.optim.Optimizer, gate: Gate | None = None) -> Iterator[Gate]:
    """A gate before the last param group of `optimizer`; open at first and at the end."""
    gate = gate or Gate()
    groups = optimizer.param_groups
    groups[-1] = GateGroup(groups[-1], gate)
    try:
        yield gate
    finally:
        gate.open()
        groups[-1] = dict(groups[-1])
