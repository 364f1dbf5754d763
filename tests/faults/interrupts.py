"""A KeyboardInterrupt at every step of `create`, `save`, `commit` and `close`. ``python -m tests.faults.interrupts --full``

A signal handler that raises can strike between any two steps of the main thread; a profile function raises at the k-th
point there at which the interpreter looks for signals, and a trace function once more a few calls later. Afterwards the
engine must close in bounded time, with all staging memory back, and what is listed must be whole and legal.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import torch

import async_ckpt
from async_ckpt import CheckpointError, transaction
from async_ckpt.filesystem import LocalFileSystem

from .oracle import check_legal, contents
from .report import Row, command, sampled
from .workloads import TIMEOUT_S, Folder, Job, Told, make_engine, quiet, state

_PACKAGE = os.path.dirname(async_ckpt.__file__) + os.sep
CLOSE_S = 10.0
"""An engine that hangs waits 30 s, by its configuration."""


class Interrupter:
    """Raises at the k-th step of this thread (None: only counts them), and again `again` function calls later.

    The steps are the points at which CPython looks for signals in the package's code: the beginning of each function
    and the return of each C call.
    """

    def __init__(self, k: int | None, again: int | None = None) -> None:
        self.num_steps = 0
        self.raised: list[str] = []
        self._k = k
        self._again = again
        self._num_calls = 0

    def _profile(self, frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(_PACKAGE):
            self.num_steps += 1
            if self._k is not None and self.num_steps > self._k:
                self._raise(frame)

    def _trace(self, frame: FrameType, event: str, arg: object) -> None:
        if self.raised and frame.f_code.co_filename.startswith(_PACKAGE):
            self._num_calls += 1
            if self._again is not None and self._num_calls > self._again:
                self._raise(frame)

    def _raise(self, frame: FrameType) -> None:
        self.raised.append(f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno}")
        raise KeyboardInterrupt("injected")

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        # Whoever raises is called no more: two interrupts need two kinds of hook.
        if self._again is not None:
            sys.settrace(self._trace)  # type: ignore[arg-type]
        sys.setprofile(self._profile)
        try:
            yield
        finally:
            sys.setprofile(None)
            sys.settrace(None)


class _Subject:
    """A tiny guarded training whose saves are lazy, and eager parts beside."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.zeros(5000))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)


def life(root: Path, told: Told, interrupter: Interrupter, *, lazy: bool, close_inside: bool) -> None:
    """Create, save twice, commit, and wait, watched; then close."""
    engine = make_engine(root, overwrite="replace")
    subject = _Subject()
    if lazy:
        engine.guard(subject.optimizer)
    told.attempt("older", 10)
    told.attempt("next", 20)
    try:
        with interrupter.watching():
            engine.create("older")
            engine.save(state(10), "model.pt")
            if lazy:
                engine.save({"w": subject.weight.detach()}, "lazy.pt")
            pending = engine.commit("older")
            if close_inside:
                engine.close()
    except KeyboardInterrupt:
        # The user goes on: the same engine must work, or say why not.
        with contextlib.suppress(CheckpointError):
            Job(engine, Told()).whole("next", 20)
            told.commit("next", 20)
    else:
        assert pending.exception(TIMEOUT_S) is None
        told.commit("older", 10)
    finally:
        sys.settrace(None)
        sys.setprofile(None)
        started = time.perf_counter()
        with contextlib.suppress(CheckpointError):
            engine.close()
        elapsed = time.perf_counter() - started
        assert elapsed < CLOSE_S, f"closing took {elapsed:.1f} s"
    # A chunk in the hands of an interrupted frame comes back with the traceback, which the last job of a thread may hold.
    for executor in (engine._inflight.helpers, engine._inflight.prefault):
        executor.join(CLOSE_S)
    gc.collect()
    assert engine._arena.num_taken == 0, f"{engine._arena.num_taken} chunks were not given back"


def check(root: Path, told: Told, k: int, again: int | None, *, lazy: bool, close_inside: bool) -> None:
    interrupter = Interrupter(k, again)
    try:
        with quiet():
            life(root, told, interrupter, lazy=lazy, close_inside=close_inside)
        # The lazy file has no version of its own.
        for tag in ("older",):
            lazy_file = root / tag / "lazy.pt"
            assert not lazy_file.exists() or lazy_file.stat().st_size > 20_000
        found = contents(root, skip="lazy.pt")
        check_legal(found, told)
        transaction.sweep(LocalFileSystem(), str(root))
        for thread in [t for t in threading.enumerate() if t.name.startswith("async-ckpt")]:
            thread.join(CLOSE_S)
            assert not thread.is_alive(), f"{thread.name} is still alive"
    except AssertionError as error:
        raise AssertionError(f"interrupted at {interrupter.raised}: {error}") from error


def sweep(
    folder: Folder, *, lazy: bool, close_inside: bool, again: int | None, sample: int | None = None, seed: int = 1, stop: bool = True
) -> Row:
    """Every step (or `sample` of them)."""
    row = Row(f"{'lazy' if lazy else 'eager'}{', close too' if close_inside else ''}{', twice' if again is not None else ''}")
    counter = Interrupter(None)
    for _ in range(2):
        # The second time, plans are made as they will be.
        root, told = folder.root()
        counter.num_steps = 0
        with quiet():
            life(root, told, counter, lazy=lazy, close_inside=close_inside)
        folder.drop(root)
    row.operations = counter.num_steps
    chosen = list(range(row.operations))
    chance = random.Random(seed)
    chosen = sampled(chosen, sample, chance)
    for k in chosen:
        root, told = folder.root()
        second = None if again is None else chance.randrange(again)
        row.check(
            f"step {k}, again after {second}",
            lambda root=root, told=told, k=k, second=second: check(root, told, k, second, lazy=lazy, close_inside=close_inside),  # type: ignore[misc]
            stop=stop,
        )
        folder.drop(root)
    return row


def main(options: argparse.Namespace) -> list[Row]:
    rows = []
    games = ((False, False, None), (True, False, None), (True, True, None), (True, True, 12))
    with Folder() as folder:
        for lazy, close_inside, again in games if options.row is None else games[options.row : options.row + 1]:
            sample = None if options.full else 150
            rows.append(sweep(folder, lazy=lazy, close_inside=close_inside, again=again, sample=sample, seed=options.seed, stop=False))
            print(rows[-1].name, rows[-1].injected, rows[-1].lost, flush=True)
    return rows


if __name__ == "__main__":
    command("KeyboardInterrupt at every step", __doc__, main, ("--row", {"type": int, "default": None, "help": "only this row, from 0"}))
