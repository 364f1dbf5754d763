"""Preemption: a signal says that the process will be killed soon; save once more, and see that it reaches the disk.

Guarantees:
- The signal handler only sets a flag: it may run in the middle of `save`, of `commit`, or of a lock. It takes no lock,
  does no I/O, and passes the signal on to the handler that was there before.
- The save hook runs at most once, on the training thread, at a safe point: `poll_preemption`, the end of `commit`, or
  the orderly end of the engine. Never inside `create` or `save`, and never in an optimizer's step hook, where the
  parameters would be one step ahead of the step counter, the schedule and the data.
- After the hook, the pending commits are waited for until the deadline, and the outcome is logged, once.
- A forked child gets the earlier handlers back: a signal to a DataLoader worker ends that worker.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from ..errors import ConfigError, TagExistsError, TransactionStateError, check_positive, report
from .pending import PendingCommit

_REFUSED = {
    signal.SIGKILL: "cannot be caught by any process; launchers send SIGTERM before it",
    signal.SIGSTOP: "cannot be caught by any process",
    **dict.fromkeys(
        (signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, signal.SIGBUS),
        "means that the process is broken, not preempted; no checkpoint can be saved then",
    ),
}
DEFAULT_DEADLINE_S = 25.0
"""Launchers send SIGKILL 30 s after SIGTERM (torchrun, Kubernetes, Slurm's KillWait): some of that is for the exit."""


def ignore_preemption(worker_id: int = 0, *, signals: Iterable[int] = (signal.SIGTERM,)) -> None:
    """Keep a DataLoader's worker alive when its whole process group is preempted: ``DataLoader(...,
    worker_init_fn=ignore_preemption)``.

    The training process needs its workers until it has saved. The first of each signal is ignored; another one ends the
    worker, and so does the loader itself. In the worker's main thread. Other signals:
    ``functools.partial(ignore_preemption, signals=(SIGUSR1,))``.

    Raises:
        ConfigError: a signal that cannot be caught.
    """
    for signum in _check_signals(signals):
        signal.signal(signum, lambda received, frame: signal.signal(received, signal.SIG_DFL) and None)


@dataclass(frozen=True, slots=True)
class PreemptionOutcome:
    """How it ended: which checkpoints are durable, which are not."""

    signal_name: str
    """Such as "SIGTERM"; "another rank" when the signal came elsewhere."""
    num_signals: int
    committed: tuple[str, ...]
    failed: tuple[str, ...]
    unfinished: tuple[str, ...]
    hook_error: BaseException | None
    elapsed_s: float
    """From the signal to the end of the draining."""

    @property
    def ok(self) -> bool:
        """Whether everything that was pending, and the last checkpoint, is durable."""
        return not (self.failed or self.unfinished or self.hook_error)


class SignalFlag:
    """Set by the first of some signals. Main thread only. Refers to nothing else: the signal table keeps no engine
    alive.

    A second signal: SIGINT raises KeyboardInterrupt; others are counted, and after `deadline_s` they do what they did
    before (schedulers and launchers often send two at once).
    """

    def __init__(self, signals: list[int], deadline_s: float) -> None:
        self.pid = os.getpid()
        self.deadline_s = deadline_s
        self.signum: int | None = None
        self.num_signals = 0
        self.at_s = 0.0
        """When the first one came, on ``time.monotonic``."""
        self._is_active = True
        self._earlier: dict[int, Any] = {}
        _flags.add(self)
        for signum in signals:
            # Known before ours is in place: a signal may arrive in between.
            self._earlier[signum] = signal.getsignal(signum)
            signal.signal(signum, self._handle)

    def remove(self) -> None:
        """Give the signals back to their earlier handlers. Off the main thread, and where somebody has chained to ours,
        these stay in place, and only pass on.
        """
        self._is_active = False
        if threading.current_thread() is threading.main_thread():
            for signum, earlier in self._earlier.items():
                if signal.getsignal(signum) == self._handle and earlier is not None:
                    signal.signal(signum, earlier)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        earlier, may_end = self._earlier.get(signum), True
        if self._is_active and os.getpid() == self.pid:
            now_s = time.monotonic()
            if self.signum is None:
                self.at_s, self.signum = now_s, signum
            self.num_signals += 1
            is_first = self.num_signals == 1
            if is_first and earlier is signal.default_int_handler:
                return
            may_end = not is_first and now_s > self.at_s + self.deadline_s
        if callable(earlier):
            earlier(signum, frame)
        elif earlier == signal.SIG_DFL and may_end:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


_flags: weakref.WeakSet[SignalFlag] = weakref.WeakSet()


def _remove_in_child() -> None:
    for flag in list(_flags):
        flag.remove()


os.register_at_fork(after_in_child=_remove_in_child)


class Preemption:
    """Watches for signals and runs the last save. Made on the main thread; `poll` on the training thread.

    Args:
        pending: the engine's unfinished commits.
        signals: which signals mean preemption.
        deadline_s: how long after the signal the process may live, in seconds.
        save: makes the last checkpoint (`create`, `save`, `commit`); None only drains what is pending.
        agree: with many ranks: gets this rank's flag and returns the whole job's, by a collective of the caller's.
            Called at each poll, so every rank must reach the same safe points. None: every rank acts on its own signal.
        exit_after: leave the process by SystemExit(128 + signal) after the outcome is known, for loops that never look.

    Raises:
        ConfigError: a signal that cannot be caught, or a bad deadline. TransactionStateError: not on the main thread.
    """

    def __init__(
        self,
        pending: Callable[[], list[PendingCommit]],
        *,
        signals: Iterable[int],
        deadline_s: float,
        save: Callable[[], object] | None,
        agree: Callable[[bool], bool] | None,
        exit_after: bool,
    ) -> None:
        chosen = _check_signals(signals)
        check_positive("deadline_s", deadline_s)
        for name, function in (("save", save), ("agree", agree)):
            if function is not None and not callable(function):
                raise ConfigError(f"{name} must be callable, not {function!r}")
        if threading.current_thread() is not threading.main_thread():
            raise TransactionStateError(
                "signal handlers can be set from the main thread only, and this is "
                f"{threading.current_thread().name!r}: call on_preemption there, before starting the thread that trains"
            )
        self.outcome: PreemptionOutcome | None = None
        self._save, self._agree, self._pending = save, agree, pending
        self._exit_after = exit_after
        self._is_agreed = False
        self._busy = threading.Lock()
        self._noted: dict[str, PendingCommit] = {}
        self._flag = SignalFlag(chosen, deadline_s)

    @property
    def preempted(self) -> bool:
        """Whether a signal has come, here or (once `agree` has said so) on another rank. Never blocks; any thread."""
        return self._flag.signum is not None or self._is_agreed

    @property
    def remaining_s(self) -> float:
        """Seconds until the deadline, at least one; infinite before a signal."""
        if not self.preempted:
            return math.inf
        return max(1.0, self._flag.at_s + self._flag.deadline_s - time.monotonic())

    def poll(self, *, may_agree: bool = True) -> bool:
        """A safe point: after a signal, run the hook and drain, once; returns whether the process is being preempted.

        Blocks until the deadline at most, apart from the hook's own time. Raises whatever the hook has raised, after
        the draining and the logging; SystemExit with `exit_after`.
        """
        if os.getpid() != self._flag.pid:
            # The parent's business, and the parent's engine.
            return False
        if not self._busy.acquire(blocking=False):
            # The hook's own commit, or another thread while the hook runs.
            return True
        try:
            if not self._everywhere(may_agree):
                # Also when a signal has come meanwhile: the others have been told no, and go on to the next safe point.
                return False
            if self.outcome is not None:
                self._drain(self.remaining_s)
                return True
            with no_workers_death():
                outcome = self._finish(run_hook=self._agree is None or self._is_agreed)
        finally:
            self._busy.release()
        if outcome.hook_error is not None:
            raise outcome.hook_error
        if self._exit_after:
            raise SystemExit(128 + (self._flag.signum or signal.SIGTERM))
        return True

    def leave(self) -> None:
        """The engine's end: the last safe point, then the signals are given back. Raises as `poll`."""
        try:
            # Another rank may have ended for good: no collective here.
            self.poll(may_agree=False)
        finally:
            self._flag.remove()

    def leave_with(self, error: BaseException) -> None:
        """The loop dies of `error`: drain only, from now on, because its state may be half way through a step. Not if
        the signal has killed a DataLoader's worker, and the loop has died of that outside of an optimizer's step.
        """
        if not (self.preempted and _is_a_workers_death(error)):
            self._save = None

    def after_commit(self, pending: PendingCommit) -> None:
        """The engine's safe point: a commit was called, and no checkpoint of the caller's is half made."""
        if self.preempted:
            self._noted[pending.tag] = pending
        self.poll()

    def _everywhere(self, may_agree: bool) -> bool:
        if self._agree is None or self._is_agreed or not may_agree:
            return self.preempted
        if self._agree(self._flag.signum is not None):
            if self._flag.signum is None:
                self._flag.at_s = time.monotonic()
            self._is_agreed = True
        return self._is_agreed

    def _finish(self, *, run_hook: bool) -> PreemptionOutcome:
        name = signal.Signals(self._flag.signum).name if self._flag.signum is not None else "another rank"
        report(logging.WARNING, "preempted (%s): saving and draining within %.1f s", name, self.remaining_s)
        save, hook_error = self._save if run_hook else None, None
        # The newest state may be on its way already, under the tag the hook will use; half the time is for the hook.
        waited = self._drain(self.remaining_s if save is None else self.remaining_s / 2)
        try:
            if save is not None:
                save()
        except TagExistsError as error:
            report(logging.INFO, "preempted: the last checkpoint is committed already (%s)", error)
        except BaseException as error:  # noqa: BLE001 - kept, and raised by poll once the other commits are safe
            hook_error = error
        waited.update(self._drain(self.remaining_s))
        failures = {tag: pending.failure() for tag, pending in waited.items() if pending.wait(0)}
        self.outcome = outcome = PreemptionOutcome(
            signal_name=name,
            num_signals=self._flag.num_signals,
            committed=tuple(tag for tag, failure in failures.items() if failure is None),
            failed=tuple(tag for tag, failure in failures.items() if failure is not None),
            unfinished=tuple(tag for tag in waited if tag not in failures),
            hook_error=hook_error,
            elapsed_s=time.monotonic() - self._flag.at_s,
        )
        what = f"committed: {', '.join(outcome.committed) or 'nothing was pending'}"
        if outcome.failed:
            what += f"; failed: {', '.join(outcome.failed)}"
        if outcome.unfinished:
            what += f"; not finished in time (not visible): {', '.join(outcome.unfinished)}"
        if hook_error is not None:
            what += f"; the last save failed: {hook_error}"
        level = logging.WARNING if outcome.ok else logging.ERROR
        report(level, "preempted (%s), %.1f s after the signal: %s", name, outcome.elapsed_s, what)
        return outcome

    def _drain(self, timeout_s: float) -> dict[str, PendingCommit]:
        deadline_s = time.monotonic() + timeout_s
        waited: dict[str, PendingCommit] = {**self._noted, **{pending.tag: pending for pending in self._pending()}}
        for pending in waited.values():
            pending.wait(max(0.0, deadline_s - time.monotonic()))
        return waited


def _is_a_workers_death(error: BaseException) -> bool:
    """Whether a worker's death has raised this: torch does so anywhere on the main thread, from a handler of SIGCHLD,
    or the loader finds the connection to the worker closed.
    """
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    if any(f"torch{os.sep}optim{os.sep}" in file for file in files):
        return False
    if isinstance(error, RuntimeError):
        return str(error).startswith("DataLoader worker")
    is_in_loader = any(file.endswith(os.path.join("torch", "utils", "data", "dataloader.py")) for file in files)
    return isinstance(error, (OSError, EOFError)) and is_in_loader and "multiprocessing" in os.path.dirname(files[-1])


@contextlib.contextmanager
def no_workers_death() -> Iterator[None]:
    """A block in which torch does not raise the deaths of DataLoaders' workers, which it does anywhere on the main
    thread, from a handler of SIGCHLD: the last save is not to end of it. The loader sees them by itself.
    """
    before = signal.getsignal(signal.SIGCHLD)
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGCHLD, lambda signum, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _check_signals(signals: Iterable[int]) -> list[int]:
    if isinstance(signals, (str, bytes)) or not isinstance(signals, Iterable):
        raise ConfigError(f"signals must be a tuple such as (signal.SIGTERM,), not {signals!r}")
    chosen: list[int] = []
    for given in signals:
        try:
            known = signal.Signals(given)
        except ValueError:
            raise ConfigError(f"{given!r} is no signal of this system; give members of signal.Signals") from None
        if known in _REFUSED:
            raise ConfigError(f"{known.name} {_REFUSED[known]}")
        chosen.append(known)
    if not chosen:
        raise ConfigError("signals is empty: give at least one, such as (signal.SIGTERM,)")
    return chosen
