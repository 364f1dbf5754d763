"""The guard: which storages cannot change before the next optimizer step, and the waits that make it true.

Guarantees:
- No optimizer of this process, guarded or not, begins a `step` before every lazy snapshot has been copied (on a device:
  before the training stream has been ordered behind the copies; the CPU does not block there). Torch calls the one
  process-wide hook behind this before the optimizers' own hooks. An optimizer without torch's base class has no hooks:
  it waits where it is guarded.
- A guarded step and a save on different threads never overlap: each waits for the other to end, whichever came first,
  for a bounded time. A save inside a step, on the same thread, does not wait, and copies everything at once.
- The optimizer can be copied, pickled, compiled, dropped, and stepped in a forked child: none of that waits or fails
  because of the guard, and neither does a step that raised.
"""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import os
import time
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch._compile import _disable_dynamo
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..errors import BackpressureTimeout, TransactionStateError, report
from ..host.device import is_capturing, refuse_capture, wait_on_stream
from ..threads.locks import Lock
from .file_copy import FileCopy
from .owned_storages import NOTHING, Owned, OwnedStorages
from .step_exclusion import StepExclusion, Turn, Work

T = TypeVar("T")

_guards: weakref.WeakSet[Guard] = weakref.WeakSet()
_captured: weakref.WeakSet[Any] = weakref.WeakSet()
"""Optimizers whose step was seen inside a graph capture: a replay of it asks nobody."""
_hook: Any = None


class Guard:
    """Guarded optimizers and the lazy snapshots in flight. Any thread."""

    def __init__(self, timeout_s: float, start_now: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._start_now = start_now
        self._pid = os.getpid()
        self._optimizers: list[weakref.ref[Any]] = []
        self.copies: list[FileCopy] = []
        """The lazy snapshots in flight; some may have been copied already."""
        self._lock = Lock()
        self._exclusion = StepExclusion(timeout_s)
        self._owned = OwnedStorages()

    def add(self, optimizer: Any) -> int:
        """Guard `optimizer` from its next step on; returns an estimate of the bytes of its parameters and state. Adding
        it twice changes nothing."""
        global _hook
        given, optimizer = optimizer, _steppable(optimizer)
        if not self.guards(optimizer):
            self._optimizers.append(weakref.ref(optimizer))
            optimizer.step = types.MethodType(_excluding(optimizer.step, weakref.ref(self)), optimizer)
            _guards.add(self)
            if _is_replayed(optimizer):
                _warn_of_replays(optimizer)
            _hook = _hook or register_optimizer_step_pre_hook(_before_any_step)
        if hasattr(given, "_optimizer_original_step_method"):
            # Accelerate's wrapper for a gradient scaler puts the step back that it knows: it must know the new one.
            given.__setstate__({})
        parameters: int = sum(p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"])
        # Adam keeps two moments per parameter, and its state does not exist before the first step.
        return 3 * parameters

    def track(self, copy: FileCopy) -> None:
        with self._lock:
            self.copies = [*(copy for copy in self.copies if not copy.copied.done()), copy]

    def save(self, work: Callable[[Turn | None], T]) -> T:
        """`work(turn)`, a save, while no guarded step runs on another thread; without a turn where nothing is guarded.
        Before any lock that a step's closure may want."""
        if not self._optimizers or os.getpid() != self._pid:
            return work(None)
        turn = Turn(self._exclusion, Work.SAVE)
        return turn.run(lambda: work(turn))

    def owned(self, wanted: Sequence[int]) -> Owned:
        """What the guarded optimizers own; nothing if that is none of the storages `wanted`, and inside a step of this
        thread: nothing waits between here and what the rest of the step changes."""
        if not self._optimizers or self._exclusion.in_own_step():
            return NOTHING
        return self._owned.of([o for o in self._alive() if not _is_replayed(o)], wanted)

    def wait(self, *, block: bool = False) -> None:
        """Return when no lazy snapshot reads guarded tensors any more; a failed one is its commit's business.

        With sources on a device and `block=False` the current streams are made to wait instead of the CPU. A forked
        child has memory of its own, in which no copy runs. Raises BackpressureTimeout: the copies did not end in time.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            # They stay listed until they are copied: another thread's step has to wait for them too.
            copies = self.copies = [copy for copy in self.copies if not copy.copied.done()]
        if copies:
            self._start_now()
        started = time.perf_counter()
        for copy in copies:
            self._wait_for(copy, block)
            ended = time.perf_counter()
            copy.guard_wait_s += ended - started
            started = ended

    def _wait_for(self, copy: FileCopy, block: bool) -> None:
        deadline = self._timeout_s
        try:
            if copy.queued.exception(deadline) is not None:
                return
            if copy.events and not block:
                devices = {event.device for event in copy.events}
                refuse_capture(
                    "a step cannot wait for a lazy snapshot (call wait_snapshot() before the capture)", devices
                )
                for event in copy.events:
                    wait_on_stream(event)
                copy.accept_changes()
            else:
                copy.copied.exception(deadline)
        # concurrent.futures.TimeoutError is the builtin from Python 3.11 on only.
        except concurrent.futures.TimeoutError:
            raise BackpressureTimeout(
                f"a lazy snapshot was not copied within {deadline:g} s; the optimizer step was not started"
            ) from None

    def remove(self) -> None:
        """Guard nothing any more. What is wrapped around `step` stays where something else was wrapped around it, and
        does nothing."""
        for optimizer in self._alive():
            wrapped: Any = getattr(optimizer.__dict__.get("step"), "__func__", None)
            if getattr(wrapped, "guard", lambda: None)() is self:
                optimizer.step = wrapped.inner
        self._optimizers.clear()

    def step(self, optimizer: Any, call: Callable[[], Any]) -> Any:
        """`call()`, a step of `optimizer`, at its turn and when the copies have been made; at once where that is not
        guarded."""
        if os.getpid() != self._pid or not self.guards(optimizer):
            return call()
        if not _is_replayed(optimizer) and _note_capture(optimizer):
            _warn_of_replays(optimizer)

        def after_copies() -> Any:
            self.wait()
            return call()

        # The turn comes first: no save can begin between the wait for the copies and the step.
        return Turn(self._exclusion, Work.STEP).run(after_copies)

    def guards(self, optimizer: Any) -> bool:
        return any(known is optimizer for known in self._alive())

    def _alive(self) -> Iterator[Any]:
        for reference in list(self._optimizers):
            optimizer = reference()
            if optimizer is not None:
                yield optimizer


def _is_replayed(optimizer: Any) -> bool:
    """Whether steps may be made that call nothing here: what they change must be saved eagerly."""
    return optimizer in _captured or any(group.get("capturable", False) for group in optimizer.param_groups)


def _note_capture(optimizer: Any) -> bool:
    """Remember a step that is being captured; returns whether it is."""
    # The first parameter of each group: a graph captures all of them, or none.
    devices = {group["params"][0].device for group in optimizer.param_groups if group["params"]}
    is_captured = any(map(is_capturing, devices))
    if is_captured:
        _captured.add(optimizer)
    return is_captured


def _warn_of_replays(optimizer: Any) -> None:
    report(
        logging.WARNING,
        "%s is capturable, or was captured in a graph: its replayed steps run no hook and move no counter, so what it "
        "owns is saved eagerly",
        type(optimizer).__name__,
        warning=RuntimeWarning,
        stacklevel=3,
    )


def _excluding(step: Callable[..., Any], guard: weakref.ref[Guard]) -> Any:
    """`step`, a bound method as a rule, as a function of the optimizer that asks `guard`.

    Whatever looks at its attributes or its signature (schedulers, scalers) finds those of `step`. In a copy of the
    optimizer it is bound to the copy, which nobody guards.
    """
    function = getattr(step, "__func__", None)

    def excluding(self: Any, *args: Any, **kwargs: Any) -> Any:
        alive = guard()
        call = (
            functools.partial(step, *args, **kwargs)
            if function is None
            else functools.partial(function, self, *args, **kwargs)
        )
        return call() if alive is None else alive.step(self, call)

    functools.update_wrapper(excluding, function or step, updated=())
    # A compiled step is compiled inside of it.
    wrapped: Any = torch._dynamo.disable(excluding, recursive=False)
    wrapped.__dict__.update(
        {name: value for name, value in vars(function or step).items() if name not in wrapped.__dict__}
    )
    wrapped.guard, wrapped.inner = guard, step
    return wrapped


@_disable_dynamo
def _before_any_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
    """Torch's hook for every optimizer."""
    if _guards:
        _note_capture(optimizer)
    for guard in list(_guards):
        guard.wait()


def _steppable(optimizer: Any) -> Any:
    """`optimizer`, or the one inside wrappers that pretend to be one and have no hooks (Accelerate's)."""
    while isinstance(optimizer, torch.optim.Optimizer) and not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        if not isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            break
        optimizer = inner
    if not callable(getattr(optimizer, "step", None)) or not hasattr(optimizer, "param_groups"):
        raise TransactionStateError(
            f"guard takes optimizers, with `step` and `param_groups`, not {type(optimizer).__name__}"
        )
    return optimizer
