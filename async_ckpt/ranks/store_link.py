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

import concurrent.futures
import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, RankFailedError
from ..threads.executor import DaemonExecutor
from ..threads.locks import Lock
from .rank_requests import Add, AwaitCount, Claim, Drop, Get, GetMany, Put, RankInfo, Request, Step

if TYPE_CHECKING:
    from torch.distributed import Store

# Never a value of ours: comparing a key with it reads the key in one request that does not wait for a missing one.
_ABSENT = "\x00"

_POLLS_PER_S = 5000
_FASTEST_POLL_S = 0.002
_REQUEST_TIMEOUT_S = 60.0


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
    """The name of this run: torchrun's, or any in a store that ends with it. Raises ConfigError: it outlives runs."""
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


def next_poll_s(world_size: int, last_s: float = 0.0) -> float:
    """How long to wait for the next poll, in a job of that size, after so long for the last one."""
    slowest_s = min(5.0, max(0.05, world_size / _POLLS_PER_S))
    return min(slowest_s, max(_FASTEST_POLL_S, slowest_s / 32, last_s * 1.5))


def answer(store: Store, prefix: str, request: Request) -> Any:
    """The answer to one request; for a wait, what one poll shows (None or False: not yet)."""
    if isinstance(request, GetMany):
        return [value.decode() for value in store.multi_get([prefix + key for key in request.keys])]
    key = prefix + request.key
    if isinstance(request, Put):
        return store.set(key, request.value)
    if isinstance(request, Add):
        return store.add(key, request.amount)
    if isinstance(request, Claim):
        return store.compare_set(key, "", request.value).decode()
    if isinstance(request, Drop):
        return store.delete_key(key)
    raw = store.compare_set(key, _ABSENT, _ABSENT).decode()
    value = None if raw == _ABSENT else raw
    if isinstance(request, AwaitCount):
        return int(value or 0) >= request.at_least
    return None if value == request.other_than else value


class _Task:
    """One generator on its way, with the wait it stands at."""

    def __init__(self, step: Step, after: Future[Any] | None, world_size: int) -> None:
        self.done: Future[Any] = Future()
        self.after = after
        self.due_s = 0.0
        self.wait: Get | AwaitCount | None = None
        self._step = step
        self._world_size = world_size
        self._deadline_s = 0.0
        self._interval_s = 0.0

    @property
    def ends_with_link(self) -> bool:
        return isinstance(self.wait, AwaitCount) and self.wait.ends_with_link

    def advance(self, ask: Callable[[Request], Any], *, is_leaving: bool) -> None:
        """Answer requests by `ask` until the step ends, which resolves `done`, or stands at a wait that is not over."""
        try:
            request = self._step.send(None) if self.wait is None else self.wait
            while True:
                answer = ask(request)
                if isinstance(request, (Get, AwaitCount)) and not answer and not self._is_over(request, is_leaving):
                    return
                self.wait = None
                request = self._step.send(answer)
        except StopIteration as end:
            self.resolve(end.value, None)
        except BaseException as error:  # noqa: BLE001 -- whoever waits for the step gets it, whatever it is
            self.resolve(None, error)

    def resolve(self, result: Any, error: BaseException | None) -> None:
        """End it, unless another thread has done so."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if error is None:
                self.done.set_result(result)
            else:
                self.done.set_exception(error)

    def _is_over(self, wait: Get | AwaitCount, is_leaving: bool) -> bool:
        """Whether the wait's time is up; else note when to poll next."""
        now = time.monotonic()
        if self.wait is not wait:
            self.wait, self._deadline_s, self._interval_s = wait, now + wait.timeout_s, 0.0
        self._interval_s = next_poll_s(self._world_size, self._interval_s)
        self.due_s = min(now + self._interval_s, self._deadline_s)
        return now >= self._deadline_s or (is_leaving and self.ends_with_link)


class StoreLink:
    """Runs the steps of one rank, many at a time, on one thread; they take turns at their waits only. Any thread; `ask`
    and `close` block, nothing else does. Keys get the run's prefix.
    """

    def __init__(self, connect: Callable[[], Store], prefix: str, info: RankInfo) -> None:
        self.info = info
        self._connect = connect
        self._prefix = prefix
        self._patience_s = min(info.timeout_s, _REQUEST_TIMEOUT_S)
        self._changed = Lock()
        self._tasks: list[_Task] = []
        self._background: list[Future[Any]] = []
        self._is_leaving = False
        self._closing: LinkLostError | None = None
        self._thread: DaemonExecutor | None = None
        self._store: Store | None = None
        self._under_way: list[float] | None = None
        """How long the request that is under way may take; another list for each."""

    def submit(self, step: Step, after: Future[Any] | None = None) -> Future[Any]:
        """Run `step` on the link's thread, once `after`, another step's future, is done."""
        task = _Task(step, after, self.info.world_size)
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

    def later(self, step: Step, after: Future[Any] | None = None) -> None:
        """Run a step whose end `close` waits for a while."""
        self.track(self.submit(step, after))

    def track(self, future: Future[Any]) -> None:
        """Let `close` wait for this too."""
        with self._changed:
            self._background = [known for known in self._background if not known.done()]
            self._background.append(future)

    def ask(self, step: Step) -> Any:
        """The result of a step that belongs to no checkpoint. Raises RankFailedError: the store is lost."""
        try:
            return self.submit(step).result()
        except LinkLostError as lost:
            raise RankFailedError(f"the ranks have lost each other: {lost}", rank=None) from lost

    def close(self, linger_s: float = _REQUEST_TIMEOUT_S) -> None:
        """Let the others read the last outcome, for at most `linger_s`; then stop the threads: unfinished steps end
        with `LinkLostError`.
        """
        deadline_s = time.monotonic() + min(linger_s, self.info.timeout_s)
        while (left_s := deadline_s - time.monotonic()) > 0:
            with self._changed:
                waiting = [future for future in self._background if not future.done()]
            if not waiting:
                break
            concurrent.futures.wait(waiting, timeout=left_s)
        with self._changed:
            self._is_leaving = True
            last = [task for task in self._tasks if task.ends_with_link]
            for task in last:
                task.due_s = 0.0
            self._changed.notify_all()
        concurrent.futures.wait([task.done for task in last], timeout=linger_s)
        with self._changed:
            self._closing = self._closing or LinkLostError("the coordinator was closed")
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread.join(linger_s)

    def _run(self) -> None:
        while (task := self._next_due()) is not None:
            task.advance(self._ask, is_leaving=self._is_leaving)
        self._end_all()

    def _ask(self, request: Request) -> Any:
        try:
            if self._store is None:
                # A connection may wait for a name service: it is not held to the time that a store has for an answer.
                self._under_way = [_REQUEST_TIMEOUT_S]
                self._store = self._connect()
            self._under_way = [self._patience_s]
            return answer(self._store, self._prefix, request)
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
        self._end_all()

    def _end_all(self) -> None:
        with self._changed:
            left, self._tasks = self._tasks, []
        for task in left:
            task.resolve(None, self._closing)

    def _next_due(self) -> _Task | None:
        with self._changed:
            while self._closing is None:
                now = time.monotonic()
                self._tasks = [task for task in self._tasks if not task.done.done()]
                begun = (task for task in self._tasks if task.after is None or task.after.done())
                first = min(begun, key=lambda task: task.due_s, default=None)
                if first is not None and first.due_s <= now:
                    return first
                self._changed.wait(None if first is None else first.due_s - now)
            return None
