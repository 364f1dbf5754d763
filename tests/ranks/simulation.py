"""The ranks' protocol with thousands of ranks on a simulated store and clock: counts requests and time, never
sleeps.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

from async_ckpt.ranks.rank_requests import GetMany, Request
from async_ckpt.ranks.store_link import answer, next_poll_s


class Pause:
    """What a simulated rank does away from the store, for `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class Dies(Exception):
    """Raised inside a simulated rank: it vanishes without a word."""


class SimulatedStore:
    """A dict behind a server that answers one request at a time, `service_s` seconds each plus `per_key_s` for each
    key.
    """

    def __init__(self, service_s: float = 20e-6, per_key_s: float = 1e-6) -> None:
        self.data: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.by_rank: Counter[int] = Counter()
        self.busy_until_s = 0.0
        self.busy_s = 0.0
        self._service_s = service_s
        self._per_key_s = per_key_s

    def arrive(self, now_s: float, rank: int, request: Request) -> float:
        """Queue a request; returns when its answer is back."""
        kind = "Poll" if getattr(request, "timeout_s", 0.0) else type(request).__name__
        self.requests[kind] += 1
        self.by_rank[rank] += 1
        cost = self._service_s + self._per_key_s * (len(request.keys) if isinstance(request, GetMany) else 1)
        self.busy_until_s = max(now_s, self.busy_until_s) + cost
        self.busy_s += cost
        return self.busy_until_s + 50e-6

    def set(self, key: str, value: str) -> None:
        self.data[key] = value

    def add(self, key: str, amount: int) -> int:
        self.data[key] = str(int(self.data.get(key, "0")) + amount)
        return int(self.data[key])

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if key not in self.data and expected:
            return expected.encode()
        if self.data.get(key, "") == expected:
            self.data[key] = desired
        return self.data[key].encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.data[key].encode() for key in keys]

    def delete_key(self, key: str) -> bool:
        return self.data.pop(key, None) is not None


Script = Generator[Any, Any, Any]


class Simulation:
    """Runs one script per rank: a generator that yields protocol requests and `Pause`s."""

    def __init__(self, world_size: int, store: SimulatedStore | None = None) -> None:
        self.store = store or SimulatedStore()
        self.now_s = 0.0
        self.ended_s: dict[int, float] = {}
        self.outcomes: dict[int, Any] = {}
        self._world_size = world_size
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def run(self, scripts: dict[int, Script]) -> None:
        for rank, script in scripts.items():
            self._at(0.0, lambda rank=rank, script=script: self._step(rank, script, None))  # type: ignore[misc]
        while self._events:
            self.now_s, _, event = heapq.heappop(self._events)
            event()

    def _at(self, when_s: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._order), event))

    def _step(self, rank: int, script: Script, value: Any) -> None:
        try:
            request = script.send(value)
        except StopIteration as end:
            self._end(rank, end.value)
        except Dies:
            self._end(rank, "dead")
        except Exception as error:  # noqa: BLE001 - an outcome like any other
            self._end(rank, error)
        else:
            if isinstance(request, Pause):
                self._at(self.now_s + request.seconds, lambda: self._step(rank, script, None))
            else:
                self._ask(rank, script, request, self.now_s, 0.0)

    def _ask(self, rank: int, script: Script, request: Request, began_s: float, interval_s: float) -> None:
        back_s = self.store.arrive(self.now_s, rank, request)
        found = answer(self.store, "", request)  # type: ignore[arg-type]  # what is used of one

        def answered() -> None:
            end_s = began_s + getattr(request, "timeout_s", 0.0)
            if found or self.now_s >= end_s:
                self._step(rank, script, found)
            else:
                pace_s = next_poll_s(self._world_size, interval_s)
                self._at(min(self.now_s + pace_s, end_s), lambda: self._ask(rank, script, request, began_s, pace_s))

        self._at(back_s, answered)

    def _end(self, rank: int, outcome: Any) -> None:
        self.outcomes[rank] = outcome
        self.ended_s[rank] = self.now_s
