"""Runs the ranks' protocol over a `torch.distributed` store, from one daemon thread with a connection of its own.

A second thread only watches the first, for a store that stops answering.

Guarantees:
- The training thread never talks to the store, and no request blocks on another rank: waits are polls of one key, so
  that an unfinished wait holds neither a thread nor the store's connection lock.
- Polls of all ranks together stay below about 5,000 requests per second whatever their number: the interval grows with
  it.
- Every submitted step resolves: with its result, its own exception, or `LinkLostError` when the store is gone or the
  link closed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import Any, Protocol

from ..errors import ConfigError
from ..threads.executor import DaemonExecutor
from ..threads.locks import Lock
from . import rank_requests as requests
from .rank_requests import Await, AwaitCount, Step

# Never a value of ours: comparing a key with it reads the key in one request that does not wait for a missing one.
_ABSENT = "\x00"

_POLLS_PER_S = 5000
_FASTEST_POLL_S = 0.002
_REQUEST_TIMEOUT_S = 60.0


class Store(Protocol):
    """The part of ``torch.distributed.Store`` that is used; TCPStore, FileStore, HashStore and PrefixStore have it."""

    def set(self, key: str, value: str) -> None: ...
    def add(self, key: str, amount: int) -> int: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...
    def delete_key(self, key: str) -> bool: ...


class LinkLostError(Exception):
    """The store does not answer any more, or the link was closed."""


def private_connection(store: Any) -> Any:
    """A connection of our own, where the store can be cloned: one shared with a process group may be busy waiting."""
    clone = getattr(store, "clone", None)
    if clone is None:
        return store
    own = clone()
    own.set_timeout(timedelta(seconds=_REQUEST_TIMEOUT_S))
    return own


def default_run_id(store: Any) -> str:
    """The name of this run: torchrun's, or any in a store that ends with it.

    Raises:
        ConfigError: the store outlives runs.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID")
    if run_id is not None:
        return f"{run_id}.{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    inner = store
    while hasattr(inner, "underlying_store"):
        inner = inner.underlying_store
    if type(inner).__name__ == "FileStore":
        raise ConfigError(
            "a FileStore keeps the keys of earlier runs: give run_id, the same on all ranks and new in every run"
        )
    return "run"


class StoreClient:
    """Answers protocol requests from a store; keys get the run's prefix."""

    def __init__(self, store: Store, prefix: str) -> None:
        self._store = store
        self._prefix = prefix

    def answer(self, request: requests.Request) -> Any:
        """The answer to one request; for a wait, what one poll shows (None or False: not yet)."""
        store = self._store
        if isinstance(request, requests.Put):
            return store.set(self._prefix + request.key, request.value)
        if isinstance(request, requests.Add):
            return store.add(self._prefix + request.key, request.amount)
        if isinstance(request, requests.Claim):
            return store.compare_set(self._prefix + request.key, "", request.value).decode()
        if isinstance(request, requests.Get):
            return self._get(request.key)
        if isinstance(request, requests.GetMany):
            return [value.decode() for value in store.multi_get([self._prefix + key for key in request.keys])]
        if isinstance(request, requests.Drop):
            return store.delete_key(self._prefix + request.key)
        if isinstance(request, AwaitCount):
            return request.at_least <= 0 or int(self._get(request.key) or 0) >= request.at_least
        value = self._get(request.key)
        return None if value == request.other_than else value

    def _get(self, key: str) -> str | None:
        value = self._store.compare_set(self._prefix + key, _ABSENT, _ABSENT).decode()
        return None if value == _ABSENT else value


class PollPace:
    """How long to wait between two polls, in a job of `world_size` ranks."""

    def __init__(self, world_size: int) -> None:
        self.slowest_s = min(5.0, max(0.05, world_size / _POLLS_PER_S))
        self.fastest_s = max(_FASTEST_POLL_S, self.slowest_s / 32)

    def after(self, interval_s: float) -> float:
        """The interval that follows `interval_s`; 0 gives the first."""
        return min(self.slowest_s, max(self.fastest_s, interval_s * 1.5))


class _Task:
    """One generator on its way, with the wait it stands at."""

    def __init__(self, step: Step, after: Future[Any] | None, pace: PollPace) -> None:
        self.done: Future[Any] = Future()
        self.after = after
        self.due_s = 0.0
        self.result: Any = None
        self._step = step
        self._pace = pace
        self._wait: Await | AwaitCount | None = None
        self._deadline_s = 0.0
        self._interval_s = 0.0

    def advance(self, ask: Callable[[requests.Request], Any]) -> bool:
        """Answer requests by `ask` until the step ends (True) or stands at a wait that is not over (False).

        Raises:
            LinkLostError: the store failed. Otherwise what the step itself raises.
        """
        try:
            request = self._step.send(None) if self._wait is None else self._wait
            while True:
                answer = ask(request)
                if isinstance(request, (Await, AwaitCount)) and not answer and not self._is_over(request):
                    return False
                self._wait = None
                request = self._step.send(answer)
        except StopIteration as end:
            self.result = end.value
            return True

    def _is_over(self, wait: Await | AwaitCount) -> bool:
        """Whether the wait's time is up; else note when to poll next."""
        now = time.monotonic()
        if self._wait is not wait:
            self._wait, self._deadline_s, self._interval_s = wait, now + wait.timeout_s, 0.0
        self._interval_s = self._pace.after(self._interval_s)
        self.due_s = min(now + self._interval_s, self._deadline_s)
        return now >= self._deadline_s


class StoreLink:
    """Runs protocol steps, many at a time, on one thread; they take turns at their waits only."""

    def __init__(
        self, connect: Callable[[], Store], prefix: str, *, world_size: int, patience_s: float = _REQUEST_TIMEOUT_S
    ) -> None:
        self._connect = connect
        self._patience_s = patience_s
        self._prefix = prefix
        self._pace = PollPace(world_size)
        self._changed = Lock()
        self._tasks: list[_Task] = []
        self._closing: LinkLostError | None = None
        self._thread: DaemonExecutor | None = None
        self._client: StoreClient | None = None
        self._under_way: list[float] | None = None
        """The request that the store has not answered yet: how long it may take, in seconds."""

    def submit(self, step: Step, after: Future[Any] | None = None) -> Future[Any]:
        """Run `step` on the link's thread, once `after`, another step's future, is done. Any thread; never blocks."""
        task = _Task(step, after, self._pace)
        with self._changed:
            if self._closing is not None:
                task.done.set_exception(self._closing)
                return task.done
            self._tasks.append(task)
            if self._thread is None:
                self._thread = DaemonExecutor("async-ckpt-ranks", 2)
                self._thread.submit(self._run)
                self._thread.submit(self._guard)
            self._changed.notify_all()
        return task.done

    def close(self, timeout_s: float = _REQUEST_TIMEOUT_S) -> None:
        """Stop the threads, after at most `timeout_s` for a request; unfinished steps end with `LinkLostError`."""
        with self._changed:
            if self._closing is None:
                self._closing = LinkLostError("the coordinator was closed")
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            task = self._next_due()
            if task is None:
                break
            try:
                if not task.advance(self._ask):
                    continue
            except BaseException as error:  # noqa: BLE001 -- whoever waits for the step gets it, whatever it is
                if self._drop(task):
                    task.done.set_exception(error)
            else:
                if self._drop(task):
                    task.done.set_result(task.result)
        self._end_all(LinkLostError("the link has ended"))

    def _ask(self, request: requests.Request) -> Any:
        try:
            if self._client is None:
                # A connection may wait for a name service: it is not held to the time that a store has for an answer.
                self._under_way = [max(self._patience_s, _REQUEST_TIMEOUT_S)]
                self._client = StoreClient(self._connect(), self._prefix)
            self._under_way = [self._patience_s]
            return self._client.answer(request)
        # torch raises DistError, a RuntimeError, for all that can happen to a store.
        except (RuntimeError, OSError, ValueError) as error:
            raise LinkLostError(f"the store does not answer: {error}") from error
        finally:
            self._under_way = None

    def _guard(self) -> None:
        """End all steps when the store keeps one request waiting: in a stopped process it never answers, and torch
        waits for ever.
        """
        look_s, waited_s = self._patience_s / 4, 0.0
        with self._changed:
            while self._closing is None:
                before_s, watched = time.monotonic(), self._under_way
                self._changed.wait(look_s)
                # Time also passes while this process is stopped: then the answer is there, and only not read yet.
                waited_s += min(look_s, time.monotonic() - before_s)
                if watched is None or watched is not self._under_way:
                    waited_s = 0.0
                elif waited_s > watched[0]:
                    where = "it lives with rank 0 or with its launcher"
                    self._closing = LinkLostError(f"the store has not answered for {watched[0]:g} s; {where}")
        self._end_all(LinkLostError("the link has ended"))

    def _end_all(self, otherwise: LinkLostError) -> None:
        with self._changed:
            left, self._tasks = self._tasks, []
        for task in left:
            task.done.set_exception(self._closing or otherwise)

    def _next_due(self) -> _Task | None:
        with self._changed:
            while self._closing is None:
                now = time.monotonic()
                begun = (task for task in self._tasks if task.after is None or task.after.done())
                first = min(begun, key=lambda task: task.due_s, default=None)
                if first is not None and first.due_s <= now:
                    return first
                self._changed.wait(None if first is None else first.due_s - now)
            return None

    def _drop(self, task: _Task) -> bool:
        """Whether it had not been ended before."""
        with self._changed:
            if task not in self._tasks:
                return False
            self._tasks.remove(task)
            return True
