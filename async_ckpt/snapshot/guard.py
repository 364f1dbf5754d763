"""The guard: which storages cannot change before the next optimizer step, and the waits that make it true.

Guarantees:
- No guarded optimizer's `step` starts before every lazy snapshot has been copied (on a device: before the training stream
  has been ordered behind the copies; the CPU does not block there).
- A step and a save on different threads never overlap: each waits for the other to end, whichever came first, for a
  bounded time. A save inside a step, on the same thread, does not wait, and copies everything at once.
- The optimizer can be copied, pickled, dropped, and stepped in a forked child: none of that waits or fails because of
  the guard, and neither does a step that raised.
"""

from __future__ import annotations

import concurrent.futures
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch._compile import _disable_dynamo

from ..errors import BackpressureTimeout, TransactionStateError
from ..host.device import wait_on_stream
from ..threads.locks import Lock
from .owned_storages import OwnedStorages
from .snapshotter import SnapshotJob
from .step_exclusion import Turns, Work

_STEP_FILE = torch.optim.Optimizer.register_step_pre_hook.__code__.co_filename


class Guard:
    """Guarded optimizers and the lazy snapshots in flight. Any thread."""

    def __init__(self, timeout_s: float, hurry: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._hurry = hurry
        self._pid = os.getpid()
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._handles: list[Any] = []
        self._jobs: list[SnapshotJob] = []
        self._lock = Lock()
        self._turns = Turns(timeout_s)
        self._owned = OwnedStorages()
        self._known: frozenset[int] | None = None

    def add(self, optimizer: torch.optim.Optimizer) -> int:
        """Hook `optimizer`; returns an estimate of the bytes of its parameters and state. Adding it twice changes nothing.

        Protects from its next step on: one that runs now on another thread has passed the hook already.
        """
        optimizer = _hookable(optimizer)
        if not any(known is optimizer for known in self._alive()):
            self._optimizers.append(weakref.ref(optimizer))
            self._known = None
            self._handles.append(optimizer.register_step_post_hook(_Hook(self, Guard._after_step)))
            self._handles.append(optimizer.register_step_pre_hook(_Hook(self, Guard._before_step)))
        parameters: int = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
        # Adam keeps two moments per parameter, and its state does not exist before the first step.
        return 3 * parameters

    def track(self, job: SnapshotJob) -> None:
        """Make the next step wait for `job`."""
        with self._lock:
            self._jobs = [*filter(_matters, self._jobs), job]

    def refresh(self) -> None:
        """Look at the optimizers again: a step or the caller may have given them other tensors."""
        self._known = None

    def saving(self) -> SaveTurn:
        """Around a save, before any lock that a step's closure may want: no guarded step runs on another thread meanwhile."""
        return SaveTurn(self._turns if self._optimizers and os.getpid() == self._pid else None)

    def storages(self) -> frozenset[int]:
        """`UntypedStorage._cdata` of every parameter and state tensor of the guarded optimizers, as of the last `refresh`.

        None at all inside a step of this thread: nothing waits between here and what the rest of the step changes.
        """
        if not self._optimizers or self._turns.in_own_step(sys._getframe()):
            return frozenset()
        known = self._known
        if known is None:
            known = self._known = self._owned.look(self._alive())
        return known

    def wait(self, *, block: bool = False) -> None:
        """Return when no lazy snapshot reads guarded tensors any more; a failed one is its commit's business.

        With sources on a device and `block=False` the current streams are made to wait instead of the CPU. A forked child has
        memory of its own, in which no copy runs.

        Raises:
            BackpressureTimeout: the copies did not end in time.
        """
        if os.getpid() != self._pid:
            return
        self.refresh()
        with self._lock:
            # They stay listed until they are copied: another thread's step has to wait for them too.
            jobs = self._jobs = list(filter(_matters, self._jobs))
        if not all(job.copied.done() for job in jobs):
            self._hurry()
        started = time.perf_counter()
        for job in jobs:
            self._wait_for(job, block)
            ended = time.perf_counter()
            job.guard_wait_s += ended - started
            started = ended

    def _wait_for(self, job: SnapshotJob, block: bool) -> None:
        deadline = self._timeout_s
        try:
            if job.enqueued.exception(deadline) is not None:
                return
            if job.events and not block:
                for event in job.events:
                    wait_on_stream(event)
            else:
                job.copied.exception(deadline)
            job.accept_changes()
        # concurrent.futures.TimeoutError is the builtin from Python 3.11 on only.
        except concurrent.futures.TimeoutError:
            raise BackpressureTimeout(f"a lazy snapshot was not copied within {deadline:g} s; the optimizer step was not started") from None

    def remove(self) -> None:
        """Take the hooks off the optimizers. Where a step runs or waits, they stay without effect: torch iterates over them."""
        if self._turns.idle:
            for handle in self._handles:
                handle.remove()
        self._handles.clear()
        self._optimizers.clear()

    def _before_step(self, optimizer: torch.optim.Optimizer, frame: FrameType) -> None:
        if os.getpid() != self._pid or not self._optimizers:
            return
        # The turn comes first: no save can begin between the wait for the copies and the step.
        self._turns.begin(Work.STEP, optimizer, frame)
        try:
            self.wait()
        except BaseException:
            self._turns.end(optimizer)
            raise

    def _after_step(self, optimizer: torch.optim.Optimizer, frame: FrameType) -> None:
        if os.getpid() == self._pid:
            self._turns.end(optimizer)

    def _alive(self) -> Iterator[torch.optim.Optimizer]:
        for reference in self._optimizers:
            optimizer = reference()
            if optimizer is not None:
                yield optimizer


class SaveTurn:
    """A save's turn, as a context."""

    def __init__(self, turns: Turns | None) -> None:
        self._turns = turns

    def __enter__(self) -> SaveTurn:
        if self._turns is not None:
            self._turns.begin(Work.SAVE, self, sys._getframe(1))
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """End it early: what remains to be done touches nothing that a step changes."""
        if self._turns is not None:
            self._turns.end(self)
            self._turns = None


class _Hook:
    """A step hook. It does not keep the guard alive, and a copy or a pickle of it does nothing: it guards other tensors, or none."""

    __slots__ = ("_act", "_guard")

    def __init__(self, guard: Guard, act: Callable[[Guard, torch.optim.Optimizer, FrameType], None]) -> None:
        self._guard = weakref.ref(guard)
        self._act = act

    # A compiled step comes back to Python here.
    @_disable_dynamo
    def __call__(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        guard = self._guard()
        if guard is not None:
            self._act(guard, optimizer, _frame_of_step())

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return _no_hook, ()


def _matters(job: SnapshotJob) -> bool:
    """Whether a step has to wait for `job`, or to say that what it changes is no sign of a torn snapshot."""
    return not (job.copied.done() and job.is_settled)


def _frame_of_step() -> FrameType:
    """Of torch's wrapper around `step`, which calls the hooks, and runs until the step has ended or raised."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename != _STEP_FILE:
        frame = frame.f_back
    return frame or sys._getframe(2)


def _no_hook() -> Callable[..., None]:
    return _do_nothing


def _do_nothing(*_: object) -> None:
    """What is left of a hook in a copy of its optimizer."""


def _hookable(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """`optimizer`, or the one inside wrappers that pretend to be one and have no hooks (Accelerate's)."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, torch.optim.Optimizer):
            raise TransactionStateError(f"{type(optimizer).__name__} has no step hooks: guard the torch optimizer inside it")
        optimizer = inner
    return optimizer
