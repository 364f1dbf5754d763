"""A KeyboardInterrupt at every step of `create`, `save`, `commit`, `close` and `load_into`. ``python -m
tests.faults.interrupts --full``

A signal handler that raises can strike between any two steps of the main thread; a profile function raises at the k-th
point there at which the interpreter looks for signals, and a trace function once more a few calls later. Afterwards the
engine must close in bounded time, with all staging memory back, and what is listed must be whole and legal. Tensors
that were being loaded into hold what they held before, or all of the file.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import gc
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import async_ckpt
from async_ckpt import AsyncCheckpointEngine, CheckpointError, TransactionStateError
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from tests.support.comparing import torch_bytes
from tests.support.insides import arena_of, threads_left
from tests.support.stepping import saved

from .oracle import check_legal, contents
from .report import ALL, Extent, Row, command, extent_of
from .workloads import CHUNK_BYTES, TIMEOUT_S, Folder, Job, Told, make_engine, quiet, state

_PACKAGE = os.path.dirname(async_ckpt.__file__) + os.sep
READ_BYTES = 5 << 20
"""More than one read block."""
_WAITS = tuple(str(module.__file__) for module in (threading, queue, concurrent.futures._base, asyncio.base_events))
"""Where the standard library holds locks for us."""
CLOSE_S = 30.0
"""An engine that hangs waits 30 s, by its configuration."""


class Interrupter:
    """Raises at the k-th step of this thread (None: only counts them), and again `again` function calls later.

    With `act` it does not raise but calls that, once, as a signal handler would be called. Only steps in the folders
    or files `within` count.

    The steps are the points at which CPython looks for signals in the package's code: the beginning of each function
    and the return of each C call.
    """

    def __init__(self, k: int | None, again: int | None = None, *, within: str | tuple[str, ...] = "") -> None:
        self.num_steps = 0
        self.raised: list[str] = []
        self._k = k
        self._again = again
        self._num_calls = 0
        folders = (within,) if isinstance(within, str) else within
        self._within = tuple(os.path.join(_PACKAGE, folder) for folder in folders)
        self.act: Callable[[], object] | None = None

    def _profile(self, frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "c_return") and frame.f_code.co_filename.startswith(self._within):
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
        if self.act is not None:
            self._k = None
            self.act()
            return
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


def save_life(root: Path, told: Told, interrupter: Interrupter, *, lazy: bool, close_inside: bool) -> None:
    """Create, save twice, commit, and wait, watched; then close."""
    engine = make_engine(root, overwrite="replace")
    weight = torch.nn.Parameter(torch.zeros(5000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    if lazy:
        engine.guard(optimizer)
    told.attempt("older", 10)
    told.attempt("next", 20)
    try:
        with interrupter.watching():
            engine.create("older")
            engine.save(state(10), "model.pt")
            if lazy:
                engine.save({"w": weight.detach()}, "lazy.pt")
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
        _end(engine)
    # The lazy file has no version of its own.
    lazy_file = root / "older" / "lazy.pt"
    assert not lazy_file.exists() or lazy_file.stat().st_size > 20_000


def handler_life(root: Path, told: Told, interrupter: Interrupter, *, handler_closes: bool) -> None:
    """A signal handler makes a checkpoint and waits for it, or closes the engine, wherever it strikes."""
    engine = make_engine(root, overwrite="replace")
    ended = []
    told.attempt("older", 10)
    told.attempt("next", 20)

    def handler() -> None:
        if handler_closes:
            engine.close()
        else:
            pending = Job(engine, Told()).start("next", 20)
            assert pending.exception(CLOSE_S) is None
            told.commit("next", 20)
        ended.append(True)

    interrupter.act = handler
    try:
        with contextlib.suppress(TransactionStateError), interrupter.watching():
            engine.create("older")
            engine.save(state(10), f"{root}/older/model.pt")
            pending = engine.commit("older")
            pending.add_done_callback(lambda _: None)
            pending.done()
            pending.result(TIMEOUT_S)
            told.commit("older", 10)
        assert ended or not interrupter.raised, "the handler failed"
        assert handler_closes or "older" in told.committed
    finally:
        _end(engine)


def _scalars(version: int) -> dict[str, Any]:
    """A state whose scalars of every kind, and the length of what is written of them, are the version's."""
    text = f"{version}".encode()
    return {
        **state(version),
        "lr": version / 7,
        "huge": version << version % 90,
        "blob": text * 3,
        "losses": [version, -version, 0.1 * version],
    }


def warm_life(root: Path, told: Told, interrupter: Interrupter, *, handler_saves: bool) -> None:
    """A cached plan takes over changed scalars, watched; each file that is saved then is torch.save's."""
    engine = make_engine(root, overwrite="replace", staging_bytes=24 * CHUNK_BYTES)
    expected = {"warm": 10, "warm2": 300, "next": 300, "last": 70_000}
    files = ["model.pt"]

    def commit(tag: str) -> None:
        told.attempt(tag, expected[tag])
        saved(engine, _scalars(expected[tag]), tag, path="model.pt").result(TIMEOUT_S)
        told.commit(tag, expected[tag])

    def handler() -> None:
        files.append("signal.pt")
        engine.save(_scalars(11), "signal.pt")

    commit("warm")
    try:
        told.attempt("warm2", 300)
        engine.create("warm2")
        interrupter.act = handler if handler_saves else None
        with interrupter.watching():
            engine.save(_scalars(300), "model.pt")
        engine.commit("warm2").result(TIMEOUT_S)
    except KeyboardInterrupt:
        pass
    else:
        told.commit("warm2", 300)
    try:
        if "warm2" not in told.committed:
            with contextlib.suppress(CheckpointError):
                engine.abort("warm2")
        commit("next")
        commit("last")
        for tag in told.committed:
            for name in files if tag == "warm2" else files[:1]:
                if tag in expected:
                    version = 11 if name == "signal.pt" else expected[tag]
                    assert (root / tag / name).read_bytes() == torch_bytes(_scalars(version)), (
                        f"{tag}/{name} is not what torch.save writes"
                    )
    finally:
        _end(engine)


def load_life(root: Path, told: Told, interrupter: Interrupter) -> None:
    """Load into existing tensors, watched; what they hold is the old or the new, and a second try succeeds."""
    engine = make_engine(root, staging_bytes=32 << 20, chunk_bytes=8 << 20)
    with contextlib.suppress(CheckpointError):
        engine.create("large")
        engine.save(state(30, num_floats=READ_BYTES // 4), "model.pt")
        told.attempt("large", 30)
        engine.commit("large").result(TIMEOUT_S)
        told.commit("large", 30)
    before = {"w": torch.full((READ_BYTES // 4,), -1.0), "i": torch.full((50,), -1), "step": -1, "path": ""}
    try:
        with interrupter.watching():
            engine.load_into(before, "large/model.pt")
    except KeyboardInterrupt:
        ends = {(float(before["w"].min()), float(before["w"].max()), int(before["i"][0]))}  # type: ignore[attr-defined]
        assert ends <= {(-1.0, -1.0, -1), (30.0, 30.0, 30)}, f"neither the old nor the new values: {ends}"
        engine.load_into(before, "large/model.pt")
    finally:
        _end(engine)
    wanted = state(30, num_floats=READ_BYTES // 4)
    assert torch.equal(before["w"], wanted["w"]) and torch.equal(before["i"], wanted["i"])  # type: ignore[arg-type]


def _end(engine: AsyncCheckpointEngine) -> None:
    """Close, unwatched: in time, and with everything back."""
    sys.settrace(None)
    sys.setprofile(None)
    started = time.perf_counter()
    with contextlib.suppress(CheckpointError):
        engine.close()
    elapsed = time.perf_counter() - started
    assert elapsed < CLOSE_S, f"closing took {elapsed:.1f} s"
    # A chunk in the hands of an interrupted frame comes back with the traceback, which the last job of a thread may
    # hold.
    gc.collect()
    assert arena_of(engine).num_taken == 0, f"{arena_of(engine).num_taken} chunks were not given back"


Life = Callable[[Path, Told, Interrupter], None]

GAMES: dict[str, tuple[Life, int | None]] = {
    "eager": (partial(save_life, lazy=False, close_inside=False), None),
    "lazy": (partial(save_life, lazy=True, close_inside=False), None),
    "lazy, close too": (partial(save_life, lazy=True, close_inside=True), None),
    "lazy, close too, twice": (partial(save_life, lazy=True, close_inside=True), 12),
    "warm, other scalars": (partial(warm_life, handler_saves=False), None),
    "warm, a handler saves": (partial(warm_life, handler_saves=True), None),
    "a handler commits and waits": (partial(handler_life, handler_closes=False), None),
    "a handler closes": (partial(handler_life, handler_closes=True), None),
    "load_into": (load_life, None),
    "load_into, twice": (load_life, 12),
}
"""What is interrupted, and within how many calls it is interrupted again."""


@contextlib.contextmanager
def unraisable_forgotten() -> Iterator[None]:
    """Pytest keeps what is raised in a `__del__`, and with the traceback the chunk whose end was interrupted."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        yield
    finally:
        sys.unraisablehook = hook


def check(root: Path, told: Told, interrupter: Interrupter, life: Life) -> None:
    try:
        with quiet(), unraisable_forgotten():
            life(root, told, interrupter)
        found = contents(root, skip=("lazy.pt", "signal.pt"))
        check_legal(found, told)
        transaction.sweep(FileSystem(), str(root))
        assert threads_left(CLOSE_S) == []
    except Exception as error:
        raise AssertionError(f"interrupted at {interrupter.raised}: {error!r}") from error


def sweep(folder: Folder, name: str, how: Extent = ALL, *, within: str = "") -> Row:
    """Every step of one of `GAMES`, in one folder of the package or all of it."""
    row = Row(name)
    life, again = GAMES[name]
    # A handler that waits must not wait for what the interrupted call holds: not in the standard library either.
    within = ("", *_WAITS) if name.startswith("a handler") else within
    counter = Interrupter(None, within=within)
    # The second time, plans are made as they will be.
    for _, root, told in folder.each(range(2)):
        counter.num_steps = 0
        with quiet():
            life(root, told, counter)
    row.operations = counter.num_steps
    chance = random.Random(how.seed)
    for k, root, told in folder.each(how.of(range(row.operations))):
        second = None if again is None else chance.randrange(again)
        interrupter = Interrupter(k, second, within=within)
        row.check(how, f"step {k}, again after {second}", check, root, told, interrupter, life)
    return row


def main(options: argparse.Namespace) -> Iterator[Row]:
    with Folder() as folder:
        for name in list(GAMES) if options.row is None else list(GAMES)[options.row : options.row + 1]:
            yield sweep(folder, name, extent_of(options, 150))


if __name__ == "__main__":
    row = {"type": int, "default": None, "help": "only this row, from 0"}
    command("KeyboardInterrupt at every step", __doc__, main, ("--row", row))
