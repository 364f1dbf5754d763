"""Threads that help the caller with an eager copy: it is the part of `save` that a training step waits for.

Guarantees:
- `CopyTeam.run` returns when every job has ended. Each ran once; their ends are told in order, on the caller's thread.
- When it raises (a job failed, or an exception came out of a signal handler), no job begins any more; a helper may
  still be at the end of one, so a helper's job must hold what it works on (`StagingArena.begin_use`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import deque
from collections.abc import Callable

from ..host.facts import local_world_size, num_cores
from ..threads.executor import DaemonExecutor
from ..threads.outcome import Outcome

# More threads than this no longer copy faster from memory to memory.
_MAX_THREADS = 8

_current_core = ctypes.CDLL(None).sched_getcpu


def num_copy_helpers() -> int:
    """How many threads help a caller to copy: its share of the cores that the ranks of this host may use. (Launchers
    set torch's own number to 1 against ranks that compute at once, and nobody computes in `save`.)"""
    return min(_share_of_cores(), _MAX_THREADS) - 1


def _share_of_cores() -> int:
    return max(1, num_cores() // local_world_size())


class CopyTeam:
    """The caller's thread and those of `helpers`, which are kept off the caller's core. Any thread."""

    def __init__(self, helpers: DaemonExecutor) -> None:
        self._submit = helpers.submit
        self._native_ids = helpers.native_ids
        self._num_helpers = len(self._native_ids)
        self._num_cores = _share_of_cores()
        self._given: dict[int, set[int]] = {}
        """The cores that this class has left each thread, and the user's own choice before that."""
        self._allowed: dict[int, set[int]] = {}

    def leaves_cores(self, num_jobs: int) -> bool:
        """Whether the disk side has a core to itself while `num_jobs` jobs run, on every rank of this host."""
        return min(self._num_helpers + 1, num_jobs) < self._num_cores

    def run(
        self,
        num_jobs: int,
        work: Callable[[int], None],
        help_with: Callable[[int], None],
        on_ended: Callable[[int], None],
    ) -> None:
        """Do jobs 0 to `num_jobs` - 1: `work(k)` on the caller's thread or `help_with(k)` on a helper; `on_ended(k)`
        once the job and all before it have ended. Blocks until all have."""
        # Taken by whoever is free. No lock: a caller that a signal handler has interrupted holds up no helper.
        waiting = deque(range(num_jobs))
        ends: list[Outcome[None]] = [Outcome() for _ in waiting]

        def do_next(do: Callable[[int], None]) -> bool:
            try:
                k = waiting.popleft()
            except IndexError:
                return False
            do(k)
            ends[k].resolve(None, None)
            return True

        def help_caller() -> None:
            try:
                while do_next(help_with):
                    pass
            except BaseException as error:  # noqa: BLE001 -- raised by whoever waits for an end
                waiting.clear()
                for end in ends:
                    end.resolve(None, error)

        num_helpers = min(self._num_helpers, num_jobs - 1)
        try:
            if num_helpers > 0:
                self._keep_off(_current_core())
            for _ in range(num_helpers):
                self._submit(help_caller)
            for k, end in enumerate(ends):
                while not end.done() and do_next(work):
                    pass
                end.result()
                on_ended(k)
        except BaseException:
            waiting.clear()
            raise

    def _keep_off(self, core: int) -> None:
        """Before helpers are woken: a kernel that sees no cache shared between cores (a virtual machine) wakes a thread
        beside the one that wakes it, where it waits for milliseconds, and then two copies share one core while another
        idles."""
        for thread in self._native_ids:
            # The cores were taken away meanwhile, the thread is gone, or this is another system: slower, not wrong.
            with contextlib.suppress(OSError, OverflowError, AttributeError):
                now = os.sched_getaffinity(thread)
                if now != self._given.get(thread):
                    self._allowed[thread] = now
                wanted = self._allowed[thread] - {core} or self._allowed[thread]
                if now != wanted:
                    os.sched_setaffinity(thread, wanted)
                    self._given[thread] = wanted
