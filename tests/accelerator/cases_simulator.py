"""The simulated accelerator itself: that it computes, and that it forgives nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
from functools import partial
from typing import Any

import pytest
import torch

from .common import DEVICE, OTHER, distinct, on
from .simulator import CAPTURE_MODES, Graph


def trained(device: torch.device, optimizer: Any, **options: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    layers = torch.nn.Linear(8, 16), torch.nn.LayerNorm(16), torch.nn.GELU(), torch.nn.Linear(16, 4)
    model = torch.nn.Sequential(*layers).to(device)
    made = optimizer(model.parameters(), lr=0.01, **options)
    batches = [torch.randn(4, 8) for _ in range(3)]
    for batch in batches:
        made.zero_grad()
        model(batch.to(device)).square().mean().backward()
        made.step()
    return [parameter.detach().cpu() for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_training_gives_what_the_cpu_gives(any_mode: str, optimizer: Any, options: dict[str, bool]) -> None:
    wanted_values = trained(torch.device("cpu"), optimizer)
    for found, wanted in zip(trained(DEVICE, optimizer, **options), wanted_values, strict=True):
        torch.testing.assert_close(found, wanted)


def test_operations_give_what_the_cpu_gives(any_mode: str) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    for function in (
        lambda t: t.t().contiguous(),
        lambda t: t[1::2, ::3] * 2,
        lambda t: torch.cat([t, t]).sum(0),
        lambda t: t.to(torch.bfloat16),
        lambda t: t.unfold(1, 2, 2).sum(),
        lambda t: torch.nonzero(t > 20),
        lambda t: torch.add(t, t, out=torch.empty(0, device=t.device)),
        lambda t: torch.view_as_complex(t.reshape(4, 3, 2)).conj(),
        lambda t: t.masked_fill(t < 3, 0.5),
        lambda t: t.clone().index_add_(0, torch.tensor([0, 1], device=t.device), t[:2]),
        lambda t: torch.stack([t, t]).mean((0, 2)),
        lambda t: torch.where(t > 5, t, -t).sort().values,
    ):
        assert torch.equal(function(base.to(DEVICE)).cpu(), function(base))


def test_the_host_dies_when_it_touches_device_memory() -> None:
    address = torch.ones(4, device=DEVICE).data_ptr()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        ctypes.string_at(address, 4)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV


def test_freed_memory_is_handed_out_at_once_and_poisoned_in_the_order_of_its_stream(simulator: Any) -> None:
    tensor = torch.ones(100, dtype=torch.uint8, device=DEVICE)
    address = tensor.data_ptr()
    with simulator.paused():
        doubled = tensor * 2
        del tensor
        reused = torch.empty(100, dtype=torch.uint8, device=DEVICE)
        assert reused.data_ptr() == address
    assert distinct(doubled) == [2]
    assert distinct(reused) == [simulator.extension.poison]


def test_memory_that_another_stream_uses_is_kept_back_only_if_that_was_said(simulator: Any) -> None:
    side = torch.Stream(DEVICE)
    for is_said in (True, False):
        tensor = torch.ones(100, device=DEVICE)
        address = tensor.data_ptr()
        torch.accelerator.synchronize(DEVICE)
        with simulator.paused():
            with on(side):
                copy = tensor * 1
            if is_said:
                tensor.record_stream(side)
            del tensor
            reused = torch.empty(100, device=DEVICE)
            assert (reused.data_ptr() == address) is not is_said
        torch.accelerator.synchronize(DEVICE)
        assert bool(simulator.races()) is not is_said
        del copy, reused


def test_a_pinned_target_holds_a_pattern_until_its_copy_has_run(simulator: Any) -> None:
    source = torch.ones(10, dtype=torch.uint8, device=DEVICE)
    target = torch.zeros(10, dtype=torch.uint8, pin_memory=True)
    with simulator.paused():
        target.copy_(source, non_blocking=True)
        assert target.tolist() == [simulator.extension.pattern] * 10
    torch.accelerator.synchronize(DEVICE)
    assert target.tolist() == [1] * 10


def test_a_copy_into_pageable_memory_waits_and_one_from_it_reads_at_once(simulator: Any) -> None:
    source, target = torch.zeros(10), torch.zeros(10)
    with simulator.paused(), simulator.no_host_sync():
        copied = torch.ones(10, device=DEVICE)
        copied.copy_(source, non_blocking=True)
        source.fill_(7)
        with pytest.raises(RuntimeError, match="the host waits for a device"):
            target.copy_(copied, non_blocking=True)
    target.copy_(copied, non_blocking=True)
    assert target.tolist() == [0] * 10
    assert simulator.waits[-1].kind == "a copy that is not asynchronous"
    assert any("cases_simulator.py" in line for line in simulator.waits[-1].stack)


@pytest.mark.parametrize(("mode", "runs_others"), [("lazy", False), ("contrary", True)])
def test_lazy_runs_only_what_a_wait_demands_and_contrary_everything_else_before(
    simulator: Any, mode: str, runs_others: bool
) -> None:
    first, second = torch.Stream(DEVICE), torch.Stream(DEVICE)
    with simulator.mode(mode):
        with on(first):
            torch.zeros(3, device=DEVICE)
        with on(second):
            torch.zeros(3, device=DEVICE)
        second.synchronize()
        assert second.query() and first.query() is runs_others


def test_contrary_and_lazy_follow_events_between_streams_and_devices(any_mode: str) -> None:
    side = torch.Stream(DEVICE)
    tensor = torch.zeros(1000, device=DEVICE)
    for _ in range(10):
        side.wait_stream(torch.accelerator.current_stream(DEVICE))
        with on(side):
            tensor.add_(1)
        torch.accelerator.current_stream(DEVICE).wait_stream(side)
        tensor.mul_(2)
    assert distinct(tensor.to(OTHER)) == [2046]


@pytest.mark.parametrize("is_ordered", [True, False])
def test_a_missing_order_is_a_race_under_every_schedule(any_mode: str, simulator: Any, is_ordered: bool) -> None:
    side = torch.Stream(DEVICE)
    tensor = torch.zeros(1000, device=DEVICE)
    if is_ordered:
        side.wait_stream(torch.accelerator.current_stream(DEVICE))
    with on(side):
        tensor.add_(1)
    torch.accelerator.synchronize(DEVICE)
    races = simulator.races()
    assert (races == []) is is_ordered
    ending = "is not ordered behind aten::zero_ (writes) on stream 0 of device 0"
    assert is_ordered or any(race.endswith(ending) for race in races)


def test_reads_of_two_streams_are_no_race_and_neither_is_what_the_host_has_waited_for(simulator: Any) -> None:
    side = torch.Stream(DEVICE)
    tensor = torch.zeros(1000, device=DEVICE)
    torch.accelerator.synchronize(DEVICE)
    with on(side):
        one = tensor + 1
    other = tensor + 1
    side.synchronize()
    tensor.add_(1)
    assert distinct(one) == distinct(other) == [1]


def test_unregistering_memory_under_a_copy_is_a_race(simulator: Any) -> None:
    memory = torch.zeros(4096, dtype=torch.uint8)
    simulator.extension.host_register(memory.data_ptr(), 4096)
    assert memory.is_pinned() and simulator.num_registered == 1
    with simulator.paused():
        memory.copy_(torch.ones(4096, dtype=torch.uint8, device=DEVICE), non_blocking=True)
        assert simulator.extension.is_in_flight(memory.data_ptr())
        simulator.extension.host_unregister(memory.data_ptr())
    torch.accelerator.synchronize(DEVICE)
    assert "unregistering by the host is not ordered behind copy" in simulator.races()[0]


def test_an_event_of_the_wrong_device_is_refused() -> None:
    event = torch.Event(OTHER)
    event.record(torch.accelerator.current_stream(OTHER))
    with pytest.raises(RuntimeError, match="event of simulated device 1"):
        event.record(torch.accelerator.current_stream(DEVICE))


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("copy", lambda: torch.ones(3, device=DEVICE)[:2].copy_(torch.ones(2))),
        ("alloc", lambda: torch.empty(3, device=DEVICE)),
        ("event", lambda: torch.Event(DEVICE).record(torch.accelerator.current_stream(DEVICE))),
        ("pin", lambda: torch.empty(3, pin_memory=True)),
        ("stream", lambda: torch.Stream(DEVICE)),
        ("launch", lambda: torch.arange(3, device=DEVICE)),
        ("run", lambda: torch.ones(3, device=DEVICE).tolist()),
    ],
)
def test_a_failure_can_be_ordered_at_any_call(simulator: Any, kind: str, call: Any) -> None:
    with simulator.inject(kind, after=1):
        if kind != "run":
            call()
        with pytest.raises(RuntimeError, match=f"injected failure of a simulated {kind}"):
            call()
        call()


def test_a_captured_graph_runs_only_when_it_is_replayed(simulator: Any) -> None:
    graph, tensor = Graph(), torch.zeros(3, device=DEVICE)
    with simulator.capture(graph):
        assert simulator.is_capturing(torch.accelerator.current_stream())
        tensor.add_(1)
    assert distinct(tensor) == [0]
    graph.replay()
    graph.replay()
    assert distinct(tensor) == [2]


UNSAFE = {
    "pin": lambda made, event: torch.empty(3, pin_memory=True),
    "register": lambda made, event: made.extension.host_register(4096, 4096),
    "unregister": lambda made, event: made.extension.host_unregister(4096),
    "stream": lambda made, event: torch.Stream(DEVICE),
    "query": lambda made, event: event.query(),
    "wait": lambda made, event: event.synchronize(),
}
"""Forbidden during a capture in the global mode, on every thread that has that mode too."""
CONFLICTING = {
    "device": lambda made, event: torch.accelerator.synchronize(DEVICE),
    "event": lambda made, event: torch.accelerator.current_stream(DEVICE).wait_event(event),
}
"""In every mode, on the thread that captures."""


def is_spoilt(simulator: Any, mode: str, act: Any) -> bool:
    """Whether `act()`, which may fail, spoils a capture of this mode around it."""
    try:
        with simulator.capture(Graph(), mode), contextlib.suppress(RuntimeError):
            act()
    except RuntimeError as error:
        assert "capture was spoilt" in str(error)
        return True
    return False


@pytest.mark.parametrize("name", [*UNSAFE, *CONFLICTING])
def test_a_capture_is_spoilt_by_what_no_device_permits_meanwhile(simulator: Any, name: str) -> None:
    event = torch.Event(DEVICE)
    event.record(torch.accelerator.current_stream(DEVICE))
    act = partial({**UNSAFE, **CONFLICTING}[name], simulator, event)
    is_unsafe = name in UNSAFE
    spoils = [is_spoilt(simulator, mode, act) for mode in CAPTURE_MODES]
    assert spoils == [True, True, not is_unsafe]
    if not is_unsafe:
        return

    def elsewhere(mode: int) -> None:
        def run() -> None:
            simulator.extension.exchange_capture_mode(mode)
            with contextlib.suppress(RuntimeError):
                act()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    for own in (0, 1, 2):
        spoils = [is_spoilt(simulator, mode, partial(elsewhere, own)) for mode in CAPTURE_MODES]
        assert spoils == [own == 0, False, False]
    with contextlib.suppress(RuntimeError):
        simulator.extension.host_unregister(4096)


def test_a_device_has_a_context_once_something_is_queued_or_chosen_there(simulator: Any) -> None:
    assert simulator.extension.take_contexts() == set()
    torch.empty(3, device=OTHER)
    assert simulator.extension.take_contexts() == {1}
