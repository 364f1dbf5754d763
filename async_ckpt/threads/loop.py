"""One daemon thread with one event loop, whose death is told to everybody who waits.

Guarantees:
- What `run` returns always resolves, whoever stops the loop, also at the same moment, cancels its tasks or raises in
  them.
- When the loop ends otherwise than by `stop`, `on_death` is told first; then its tasks are given the chance to clean
  up.
- A callback that raises ends the loop: better dead, and told, than a file that waits for ever.
- What another thread asks of the loop is heard within a second even where waking it up failed (asyncio's own pipe).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ..errors import TransactionStateError, WriteError, report
from .executor import start_thread
from .outcome import Outcome

T = TypeVar("T")

_HEARTBEAT_S = 1.0


class LoopThread:
    """The writer's loop. Any thread, unless a method says otherwise; only `join` blocks.

    Args:
        on_death: called on the dying thread with the error that every later call raises.
        on_undrained: called on the dying thread when the tasks could not be ended.
    """

    def __init__(
        self, name: str, *, on_death: Callable[[BaseException], None], on_undrained: Callable[[], None]
    ) -> None:
        # Not the policy's loop: others schedule differently and may refuse to be stopped from outside.
        self.loop: asyncio.AbstractEventLoop = asyncio.SelectorEventLoop()
        self.loop.set_exception_handler(self._on_exception)
        self.death: BaseException | None = None
        self._on_death = on_death
        self._on_undrained = on_undrained
        self._runs: dict[Outcome[Any], asyncio.Task[None] | Coroutine[Any, Any, Any]] = {}
        """What has begun is a task."""
        self._fatal: BaseException | None = None
        self._is_stopping = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def start(self) -> None:
        start_thread(self._thread)

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def call(self, callback: Callable[[], object]) -> None:
        """Run a callback on the loop; nothing happens when the loop is gone: everything has been told then."""
        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(callback)

    def run(self, coro: Coroutine[Any, Any, T]) -> Outcome[T]:
        """Run a coroutine on the loop. Raises WriteError: the loop is dead. TransactionStateError: it was stopped."""
        outcome: Outcome[T] = Outcome()
        # Before the loop is looked at, and without a lock: when it dies from here on, it finds this one.
        self._runs[outcome] = coro
        try:
            if self.death is None and not self._is_stopping:
                self.loop.call_soon_threadsafe(self._start, coro, outcome)
                return outcome
        except RuntimeError:
            # A signal handler has closed the loop in between.
            pass
        except BaseException:
            # An interrupt in between: nobody may wait for what was never started. What was, enters itself again.
            self._runs.pop(outcome, None)
            raise
        self._runs.pop(outcome, None)
        coro.close()
        raise self.death or _stopped()

    def runs(self) -> list[Outcome[Any]]:
        """Outcomes of `run` that are not known yet. Not of a call of `run` that is still on its way."""
        return [outcome for outcome, run in list(self._runs.items()) if isinstance(run, asyncio.Task)]

    def stop(self) -> None:
        """To be called when nothing is left to do."""
        self._is_stopping = True
        self.call(self.loop.stop)

    def join(self, timeout_s: float | None) -> bool:
        """Wait for the thread; False when it still runs after `timeout_s` seconds."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # The thread.

    def _work(self) -> None:
        try:
            self._beat()
            self.loop.run_forever()
        except BaseException as error:  # noqa: BLE001 -- whatever it is, every waiter gets it as the cause
            self._fatal = error
        if not self._is_stopping or self._fatal is not None:
            self._die(self._fatal)
        else:
            self._resolve_runs(_stopped())
        self._drain()
        self.loop.close()
        for run in list(self._runs.values()):
            if not isinstance(run, asyncio.Task):
                # Asked for while the loop was ending, and told already: see `run`.
                run.close()

    def _beat(self) -> None:
        # asyncio says nothing of a wake-up that it could not send: the loop would sleep on with its work queued.
        self.loop.call_later(_HEARTBEAT_S, self._beat)

    def _die(self, cause: BaseException | None) -> None:
        reason = repr(cause) if cause is not None else "its event loop was stopped from outside"
        death = WriteError(
            f"the checkpoint writer died ({reason}); what it had not synced is not committed, older checkpoints "
            "are untouched"
        )
        death.__cause__ = cause
        self.death = death
        self._on_death(death)
        self._resolve_runs(death)
        report(logging.ERROR, "%s", death, cause=cause)

    def _resolve_runs(self, error: BaseException) -> None:
        for outcome in list(self._runs):
            outcome.resolve(None, error)

    def _drain(self) -> None:
        """Let every task end, so that memory and descriptors are given back; the loop may be stopped under us again."""
        try:
            self.loop.run_until_complete(self._end_tasks())
        except BaseException as error:  # noqa: BLE001 -- the death has been told; only the clean-up is at stake
            report(logging.INFO, "the dying writer's loop was interrupted again: %r", error)
            self._on_undrained()

    async def _end_tasks(self) -> None:
        cancelled: set[asyncio.Task[None]] = set()
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            # Only coroutines of `run`: files have been told, and wait for their threads by themselves.
            for run in list(self._runs.values()):
                if isinstance(run, asyncio.Task) and run not in cancelled:
                    cancelled.add(run)
                    run.cancel()
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)

    def _start(self, coro: Coroutine[Any, Any, T], outcome: Outcome[T]) -> None:
        task = self._runs[outcome] = self.loop.create_task(self._serve(coro, outcome))
        task.add_done_callback(lambda _: self._ended(coro, outcome))

    async def _serve(self, coro: Coroutine[Any, Any, T], outcome: Outcome[T]) -> None:
        try:
            outcome.resolve(await coro, None)
        except asyncio.CancelledError as cancelled:
            outcome.resolve(None, self._cancelled_error(cancelled))
        except BaseException as error:
            outcome.resolve(None, error)
            # As asyncio itself does: KeyboardInterrupt and SystemExit end the loop, and everybody is told.
            if not isinstance(error, Exception):
                raise

    def _ended(self, coro: Coroutine[Any, Any, T], outcome: Outcome[T]) -> None:
        # Cancelled before its first step, the coroutine was not even begun.
        coro.close()
        if not outcome.done():
            outcome.resolve(None, self._cancelled_error(None))
        # Without the lock: a signal handler may wait for this loop on a thread that it has interrupted inside `run`.
        self._runs.pop(outcome, None)

    def _cancelled_error(self, cause: BaseException | None) -> BaseException:
        if self.death is not None:
            return self.death
        # A thread that was renaming it goes on.
        error = WriteError(
            "a task of the checkpoint writer was cancelled; unless it was being renamed, this checkpoint is not "
            "committed: list the root"
        )
        error.__cause__ = cause
        return error

    def _on_exception(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "handle" not in context:
            # Not asyncio's own handler, which logs: log handlers are the user's code.
            report(logging.WARNING, "the writer's loop: %s", context.get("message"), cause=context.get("exception"))
            return
        self._fatal = context.get("exception")
        loop.stop()


def _stopped() -> TransactionStateError:
    return TransactionStateError("the writer's loop was stopped")
