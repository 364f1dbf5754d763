"""Futures of our own threads."""

from __future__ import annotations

import contextlib
import os
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

from .executor import check_process

T = TypeVar("T")


class Outcome(Future[T]):
    """A future that cannot be cancelled, resolves once (later outcomes are ignored), and refuses waits after a fork."""

    def __init__(self) -> None:
        super().__init__()
        self._pid = os.getpid()
        self.set_running_or_notify_cancel()

    def result(self, timeout: float | None = None) -> T:
        """As `Future.result`. Raises TransactionStateError in a forked child."""
        check_process(self._pid, "this write")
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """As `Future.exception`. Raises TransactionStateError in a forked child."""
        check_process(self._pid, "this write")
        return super().exception(timeout)

    def resolve(self, result: T | None, error: BaseException | None) -> None:
        """Set the outcome unless there is one: a pool that dies may race with the end of a file."""
        with contextlib.suppress(InvalidStateError):
            if error is not None:
                self.set_exception(error)
            else:
                self.set_result(result)  # type: ignore[arg-type]
