"""The guard: which storages cannot change before the next optimizer step, and the wait that makes it true.

Guarantees: no guarded optimizer's `step` starts before every lazy snapshot has been copied (on CUDA: before the
training stream has been ordered behind the copies; the CPU does not block there).
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from .errors import BackpressureTimeout
from .snapshot import SnapshotJob
from .snapshot.copying import all_storage_ids


class Guard:
    """Guarded optimizers and the lazy snapshots in flight. Any thread."""

    def __init__(self, timeout_s: float, hurry: Callable[[], None]) -> None:
        self._timeout_s = timeout_s
        self._hurry = hurry
        self._optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._handles: list[Any] = []
        self._jobs: list[SnapshotJob] = []
        self._lock = threading.Lock()
        self._known: frozenset[int] | None = None

    def add(self, optimizer: torch.optim.Optimizer) -> int:
        """Hook `optimizer`; returns an estimate of the bytes of its parameters and state. Adding it twice changes nothing."""
        if not any(known() is optimizer for known in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))
            # The hook must not keep an engine alive for as long as the optimizer lives.
            myself = weakref.ref(self)
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: _wait(myself)))
        parameters = sum(p.numel() * p.element_size() for p in _parameters(optimizer))
        # Adam keeps two moments per parameter, and its state does not exist before the first step.
        return 3 * parameters

    def track(self, job: SnapshotJob) -> None:
        """Make the next step wait for `job`."""
        with self._lock:
            self._jobs = [j for j in self._jobs if not j.copied.done()]
            self._jobs.append(job)

    def refresh(self) -> None:
        """Look at the optimizers again: a step or the caller may have given them other tensors."""
        self._known = None

    def storages(self) -> frozenset[int]:
        """`UntypedStorage._cdata` of every parameter and state tensor of the guarded optimizers, as of the last `refresh`."""
        known = self._known
        if known is None:
            tensors: list[torch.Tensor] = []
            for reference in self._optimizers:
                optimizer = reference()
                if optimizer is not None:
                    tensors.extend(_parameters(optimizer))
                    tensors.extend(v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))
            known = self._known = frozenset(all_storage_ids(tensors))
        return known

    def wait(self, *, block: bool = False) -> None:
        """Return when no lazy snapshot reads guarded tensors any more; a failed one is its commit's business.

        With CUDA sources and `block=False` the current streams are made to wait instead of the CPU.

        Raises:
            BackpressureTimeout: the copies did not end in time.
        """
        with self._lock:
            jobs, self._jobs = self._jobs, []
        started = time.perf_counter()
        self.refresh()
        self._hurry()
        for k, job in enumerate(jobs):
            try:
                self._wait_for(job, block)
            except BackpressureTimeout:
                # They still read the tensors: the next step has to wait for them too.
                with self._lock:
                    self._jobs = jobs[k:] + self._jobs
                raise
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
                    torch.cuda.current_stream(event.device).wait_event(event)
                return
            job.copied.exception(deadline)
        # concurrent.futures.TimeoutError is the builtin from Python 3.11 on only.
        except concurrent.futures.TimeoutError:
            raise BackpressureTimeout(f"a lazy snapshot was not copied within {deadline:g} s; the optimizer step was not started") from None

    def remove(self) -> None:
        """Take the hooks off the optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._optimizers.clear()


def _wait(reference: weakref.ref[Guard]) -> None:
    guard = reference()
    if guard is not None:
        guard.wait()


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
