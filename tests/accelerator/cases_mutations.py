"""The simulated accelerator sees the mistakes that it is there for: each is planted, and a schedule must show it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt.errors import CheckpointError
from async_ckpt.host import device as devices
from async_ckpt.integrations.dcp import stager as staging
from async_ckpt.reading import scatter
from async_ckpt.snapshot import file_copy, guard
from async_ckpt.snapshot import payloads as side

from .common import (
    DEVICE,
    OTHER,
    SIZE,
    TIMEOUT_S,
    all_chunks,
    distinct,
    engine,
    guarded,
    on,
    on_disk,
    saved,
    wait_until_queued,
)
from .simulator import MODES


def nothing(*_: Any, **__: Any) -> None:
    """Instead of a wait."""


def saves_between_kernels(root: Path, simulator: Any) -> bool:
    """Eager saves on a stream of the caller's own, in a row; True when all is right."""
    with engine(root) as made, on(torch.Stream(DEVICE)):
        weight = torch.zeros(SIZE, device=DEVICE)
        for step in range(3):
            weight.add_(1)
            pending = saved(made, f"{step}", model={"w": weight})
            weight.add_(10)
            pending.result(TIMEOUT_S)
    return [distinct(on_disk(root, f"{step}")["w"]) for step in range(3)] == [[1], [12], [23]]


def guarded_steps(root: Path, simulator: Any, device: torch.device = DEVICE) -> bool:
    """Lazy saves with a step behind each."""
    weight, optimizer = guarded(0.0, device)
    with engine(root) as made:
        made.guard(optimizer)
        for step in range(3):
            pending = saved(made, f"{step}", model={"w": weight.detach()})
            optimizer.step()
        pending.result(TIMEOUT_S)
    return [distinct(on_disk(root, f"{step}")["w"]) for step in range(3)] == [[0], [-1], [-2]]


def guarded_steps_on_another_device(root: Path, simulator: Any) -> bool:
    """The same on a device that is not the current one."""
    return guarded_steps(root, simulator, OTHER)


def memory_freed_after_a_save(root: Path, simulator: Any) -> bool:
    """A guarded tensor's memory is given up while its copy is queued."""
    weight, optimizer = guarded()
    with engine(root) as made:
        made.guard(optimizer)
        with simulator.paused():
            pending = saved(made, "t", model={"w": weight.detach()})
            wait_until_queued(made)
            weight.untyped_storage().resize_(0)
            torch.full((SIZE,), 7.0, device=DEVICE)
        pending.result(TIMEOUT_S)
    return distinct(on_disk(root, "t")["w"]) == [1]


def a_failing_copy(root: Path, simulator: Any) -> bool:
    """Chunks of a save that fails half way are free, and no device writes to them."""
    state = {"w": torch.ones(SIZE, device=DEVICE)}
    with engine(root) as made:
        made.prewarm()
        made.create("t")
        with simulator.inject("copy", after=2), contextlib.suppress(RuntimeError):
            made.save(state, "model.pt")
        with all_chunks(made) as chunks:
            is_quiet = not any(simulator.extension.is_in_flight(chunk.address) for chunk in chunks)
        with contextlib.suppress(CheckpointError, RuntimeError):
            made.abort("t")
    return is_quiet and bool(chunks)


def a_load(root: Path, simulator: Any) -> bool:
    """A load on a stream of the caller's own, into memory that was used there."""
    with engine(root) as made:
        saved(made, "t", model={"w": torch.full((SIZE,), 3.0)}).result(TIMEOUT_S)
        with on(torch.Stream(DEVICE)):
            torch.ones(SIZE, device=DEVICE).mul_(2)
            loaded = made.load("t/model.pt", map_location=DEVICE)["w"]
        with on(torch.Stream(DEVICE)):
            return distinct(loaded) == [3]


def a_load_into(root: Path, simulator: Any) -> bool:
    """A load into a tensor that another stream still reads, and that another reads at once."""
    target = torch.ones(SIZE, device=DEVICE)
    torch.accelerator.synchronize(DEVICE)
    with engine(root) as made:
        saved(made, "t", model={"w": torch.full((SIZE,), 3.0)}).result(TIMEOUT_S)
        with on(torch.Stream(DEVICE)) as stream:
            before = target * 1
        made.load_into({"w": target}, "t/model.pt")
        with on(torch.Stream(DEVICE)):
            after = distinct(target)
        with on(stream):
            return (distinct(before), after) == ([1], [3])


def staged(root: Path, simulator: Any) -> bool:
    """What the stager returns is read at once."""
    stager = staging.ArenaStager(num_slots=1, timeout_s=TIMEOUT_S)
    try:
        weight = torch.ones(SIZE, device=DEVICE)
        return distinct(stager.stage({"w": weight})["w"]) == [1]
    finally:
        torch.accelerator.synchronize(DEVICE)
        gc.collect()
        stager.close()


def beside_a_capture(root: Path, simulator: Any) -> bool:
    """A save while another thread captures a graph."""
    weight, other = torch.ones(SIZE, device=DEVICE), torch.ones(3, device=DEVICE)
    with simulator.captured_elsewhere(other), engine(root) as made:
        saved(made, "t", model={"w": weight}).result(TIMEOUT_S)
    return distinct(on_disk(root, "t")["w"]) == [1]


def recorded_early(monkeypatch: Any) -> None:
    """The event of a chunk's copies stands before them."""
    early: list[torch.Event] = []

    @contextlib.contextmanager
    def entered(stream: torch.Stream) -> Iterator[None]:
        with devices.on_stream(stream):
            early.append(devices.record_now(stream.device))
            yield

    def record(device: torch.device) -> torch.Event:
        return early.pop() if early else devices.record_now(device)

    monkeypatch.setattr(side, "on_stream", entered)
    monkeypatch.setattr(side, "record_now", record)


def waits_on_the_current_device(event: torch.Event) -> None:
    """Not on the event's."""
    torch.accelerator.current_stream().wait_event(event)


Plant = Callable[[Any], None]
Scenario = Callable[[Path, Any], bool]


def patched(owner: Any, name: str, replacement: Any = nothing) -> Plant:
    return lambda monkeypatch: monkeypatch.setattr(owner, name, replacement)


MISTAKES: dict[str, tuple[Plant, Scenario]] = {
    "the side stream is not behind the caller's": (patched(side.SideStreams, "order_behind"), saves_between_kernels),
    "the step is not behind the copies": (patched(guard, "wait_on_stream"), guarded_steps),
    "the wait for an event is on the wrong device": (
        patched(guard, "wait_on_stream", waits_on_the_current_device),
        guarded_steps_on_another_device,
    ),
    "chunks are sent before their copies have ended": (patched(file_copy, "synchronize"), guarded_steps),
    "an event is recorded before the copies": (recorded_early, guarded_steps),
    "chunks are given back in flight": (patched(side.SideStreams, "finish"), a_failing_copy),
    "memory is not kept for the side stream": (patched(side, "keep_for"), memory_freed_after_a_save),
    "load does not wait": (patched(scatter, "synchronize"), a_load),
    "load copies on a stream of its own": (patched(scatter, "on_stream", lambda _: contextlib.nullcontext()), a_load),
    "load_into does not wait for readers": (patched(torch.accelerator, "synchronize"), a_load_into),
    "load_into does not wait for its copies": (patched(scatter, "synchronize"), a_load_into),
    "calls are forbidden by another thread's capture": (
        patched(devices, "beside_captures", lambda _: contextlib.nullcontext()),
        beside_a_capture,
    ),
    "the stager does not wait": (patched(staging, "synchronize"), staged),
}
SCENARIOS = sorted({scenario for _, scenario in MISTAKES.values()}, key=lambda scenario: scenario.__name__)


def is_right(scenario: Scenario, root: Path, simulator: Any, mode: str) -> bool:
    simulator.begin_anew()
    with simulator.mode(mode, seed=1):
        try:
            result = scenario(root, simulator)
        except (CheckpointError, RuntimeError):
            result = False
    simulator.extension.drain()
    races = simulator.races()
    simulator.begin_anew()
    return result and races == []


@pytest.mark.parametrize("scenario", SCENARIOS, ids=[scenario.__name__ for scenario in SCENARIOS])
def test_without_a_mistake_nothing_is_seen(tmp_path: Path, simulator: Any, scenario: Scenario) -> None:
    assert [is_right(scenario, tmp_path / mode, simulator, mode) for mode in MODES] == [True] * len(MODES)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_planted_mistake_is_seen(tmp_path: Path, simulator: Any, monkeypatch: Any, mistake: str) -> None:
    plant, scenario = MISTAKES[mistake]
    plant(monkeypatch)
    assert not all(is_right(scenario, tmp_path / mode, simulator, mode) for mode in MODES)
