"""Faults that the device path once had, each with what its cause would break elsewhere."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt.errors import TornSnapshotError, TransactionStateError
from async_ckpt.host.device import pinning
from async_ckpt.integrations.dcp import load_sharded, save_sharded
from async_ckpt.integrations.dcp.stager import ArenaStager
from async_ckpt.snapshot.arena import StagingArena
from tests.support.insides import arena_of

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
from .simulator import Graph


def committed(root: Path, **state: torch.Tensor) -> None:
    with engine(root) as made:
        saved(made, "t", model=state).result(TIMEOUT_S)


def test_load_under_a_stream_of_the_callers_own_is_not_overwritten_by_what_its_memory_was_before(
    tmp_path: Path, any_mode: str
) -> None:
    committed(tmp_path, w=torch.full((SIZE,), 3.0, device=DEVICE))
    with engine(tmp_path) as made, on(torch.Stream(DEVICE)):
        before = torch.ones(SIZE, device=DEVICE)
        address = before.data_ptr()
        before.mul_(2)
        del before
        loaded = made.load("t/model.pt")["w"]
        assert loaded.data_ptr() == address
        assert distinct(loaded) == [3]


@pytest.mark.parametrize("order", ["same", "transposed"])
def test_load_into_waits_for_kernels_that_still_read_its_targets(tmp_path: Path, any_mode: str, order: str) -> None:
    wanted = torch.arange(SIZE, dtype=torch.float32).reshape(256, -1)
    committed(tmp_path, w=wanted)
    target = torch.ones(256, SIZE // 256, device=DEVICE)
    if order == "transposed":
        target = torch.ones(SIZE // 256, 256, device=DEVICE).t()
    torch.accelerator.synchronize(DEVICE)
    with engine(tmp_path) as made:
        with on(torch.Stream(DEVICE)):
            read = target * 1
        made.load_into({"w": target}, "t/model.pt")
        assert distinct(read) == [1]
    assert torch.equal(target.cpu(), wanted)


@pytest.mark.parametrize("act", ["freed", "freed and taken back", "replaced"])
def test_memory_that_is_freed_behind_a_lazy_save_is_not_given_to_others_before_its_copy(
    tmp_path: Path, any_mode: str, simulator: Any, act: str
) -> None:
    weight, optimizer = guarded()
    with engine(tmp_path) as made:
        made.guard(optimizer)
        made.prewarm()
        with simulator.paused():
            pending = saved(made, "t", model={"w": weight.detach()})
            wait_until_queued(made)
            storage = weight.untyped_storage()
            if act == "replaced":
                weight.data = torch.zeros(SIZE, device=DEVICE)
            else:
                storage.resize_(0)
            others = [torch.full((SIZE,), 7.0, device=DEVICE) for _ in range(3)]
            if act == "freed and taken back":
                storage.resize_(SIZE * 4)
        pending.result(TIMEOUT_S)
        assert distinct(others[0]) == [7]
    assert distinct(on_disk(tmp_path, "t")["w"]) == [1]


def test_the_stager_keeps_its_slot_while_a_device_writes_to_it(any_mode: str, simulator: Any) -> None:
    stager = ArenaStager(num_slots=1, timeout_s=TIMEOUT_S)
    state = {f"w{k}": torch.full((SIZE,), float(k), device=DEVICE) for k in range(4)}
    try:
        stager.stage(state)
        torch.accelerator.synchronize(DEVICE)
        gc.collect()
        with simulator.inject("copy", after=2), pytest.raises(RuntimeError, match="injected"):
            stager.stage(state)
        gc.collect()
        [chunk] = arena_of(stager).try_reserve(1) or []
        assert not simulator.extension.is_in_flight(chunk.address)
        arena_of(stager).release(chunk)
    finally:
        stager.close()


def test_a_dropped_stager_leaves_no_memory_registered(simulator: Any) -> None:
    stager = ArenaStager(num_slots=1)
    stager.stage({"w": torch.ones(SIZE, device=DEVICE)})
    assert simulator.num_registered == 1
    del stager
    gc.collect()
    assert simulator.num_registered == 0


def test_memory_is_pinned_for_the_callers_device_on_whatever_thread(tmp_path: Path, simulator: Any) -> None:
    torch.accelerator.set_device_index(1)
    try:
        weight, optimizer = guarded(device=OTHER)
        simulator.extension.take_contexts()
        with engine(tmp_path) as made:
            made.guard(optimizer)
            made.prewarm()
            saved(made, "t", model={"w": weight.detach()}).result(TIMEOUT_S)
            loaded = made.load("t/model.pt")["w"]
            made.load_into({"w": loaded}, "t/model.pt")
        stager = ArenaStager(num_slots=1)
        stager.stage({"w": weight.detach()})
        stager.close()
        assert simulator.extension.take_contexts() == {1}
        assert torch.accelerator.current_device_index() == 1
    finally:
        torch.accelerator.set_device_index(0)


def test_calls_leave_the_callers_device_and_streams_as_they_were(tmp_path: Path) -> None:
    elsewhere = torch.accelerator.current_stream(OTHER)
    with engine(tmp_path) as made, on(torch.Stream(DEVICE)) as stream:
        saved(made, "t", model={"a": torch.ones(SIZE, device=OTHER), "b": torch.ones(SIZE, device=DEVICE)}).result(
            TIMEOUT_S
        )
        made.load_into(made.load("t/model.pt"), "t/model.pt")
        assert torch.accelerator.current_device_index() == 0
        assert torch.accelerator.current_stream() == stream
        assert torch.accelerator.current_stream(OTHER) == (elsewhere if OTHER != DEVICE else stream)


@pytest.mark.parametrize("default", ["meta", str(OTHER), "cpu"])
def test_a_default_device_changes_nothing(tmp_path: Path, default: str) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = {"cpu": base, "device": base.to(DEVICE), "sparse": base.to_sparse(), "p": torch.nn.Parameter(base.t())}
    with engine(tmp_path) as made, torch.device(default):
        saved(made, "t", model=state, plain={k: v for k, v in state.items() if k != "sparse"}).result(TIMEOUT_S)
        target = {
            "cpu": torch.zeros(4, 6, device="cpu"),
            "p": torch.zeros(6, 4, device=DEVICE),
            "device": torch.zeros(4, 6, device=DEVICE),
        }
        made.load_into(target, "t/plain.pt")
        loaded = made.load("t/model.pt")
    for found in (loaded, target):
        for name, tensor in found.items():
            assert torch.equal(tensor.cpu().to_dense(), state[name].cpu().to_dense())
    assert {name: tensor.device.type for name, tensor in loaded.items()} == {
        name: t.device.type for name, t in state.items()
    }


def test_every_chunk_is_pinned_after_prewarm_while_another_thread_warms_too(tmp_path: Path) -> None:
    for _ in range(5):
        with engine(tmp_path, staging_bytes=8 << 20) as made:
            made.prewarm()
            with all_chunks(made) as chunks:
                assert [chunk.tensor.is_pinned() for chunk in chunks] == [True] * arena_of(made).num_chunks


def test_fault_in_waits_for_the_chunk_that_another_thread_is_pinning(simulator: Any) -> None:
    begun, may_go_on = threading.Event(), threading.Event()
    arena = StagingArena(2, 64 << 10, pinning=pinning(True))
    register = arena.pinning.register

    def slow(address: int, num_bytes: int) -> None:
        begun.set()
        may_go_on.wait(TIMEOUT_S)
        register(address, num_bytes)

    arena.pinning.register = slow
    warming = [threading.Thread(target=arena.fault_in, args=(2 * 64 << 10,)) for _ in range(3)]
    for thread in warming:
        thread.start()
    begun.wait(TIMEOUT_S)
    assert arena.num_faulted == 0 and warming[2].is_alive()
    may_go_on.set()
    for thread in warming:
        thread.join(TIMEOUT_S)
    assert arena.num_faulted == simulator.num_registered == 2
    arena.close()


@pytest.mark.parametrize("is_registered", [True, False])
def test_a_chunk_that_could_not_be_pinned_is_pinned_later_or_not_used(
    simulator: Any, is_registered: bool, monkeypatch: Any
) -> None:
    from async_ckpt.host import device

    if not is_registered:
        monkeypatch.delitem(device.drivers, DEVICE.type)
    arena = StagingArena(3, 64 << 10, pinning=pinning(True))
    with simulator.inject("pin", after=1), pytest.raises(TransactionStateError, match="refused to pin"):
        arena.fault_in(3 * 64 << 10)
    assert (arena.num_faulted, arena.num_free) == (1, 3)
    with simulator.inject("pin", after=1), pytest.raises(TransactionStateError, match="refused to pin"):
        arena.try_reserve(3)
    assert (arena.num_faulted, arena.num_free) == (2, 3)
    chunks = arena.try_reserve(3) or []
    assert [chunk.tensor.is_pinned() for chunk in chunks] == [True] * 3
    assert len({chunk.address for chunk in chunks}) == 3 and all(chunk.address % 4096 == 0 for chunk in chunks)
    for chunk in chunks:
        arena.release(chunk)
    del chunk, chunks
    arena.close()


def test_nothing_waits_for_the_device_from_create_to_the_step(tmp_path: Path, simulator: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 8)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    wanted = {}

    def gradients() -> None:
        model(torch.ones(4, 256, device=DEVICE)).square().mean().backward()

    gradients()
    optimizer.step()
    with engine(tmp_path) as made:
        made.guard(optimizer)
        made.prewarm()
        for tag in ("first", "second"):
            gradients()
            wanted[tag] = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
            torch.accelerator.synchronize(DEVICE)
            simulator.waits.clear()
            with simulator.paused(), simulator.no_host_sync():
                made.create(tag)
                made.save(model.state_dict(), "model.pt")
                made.save(optimizer.state_dict(), "optim.pt")
                made.save(model.state_dict(), "again.pt")
                pending = made.commit(tag)
                optimizer.step()
                mine = [wait for wait in simulator.waits if wait.thread == threading.current_thread().name]
            pending.result(TIMEOUT_S)
            assert mine == []
            assert {save.mode for save in pending.metrics.saves} == {"lazy"}
    for tag, state in wanted.items():
        for name in ("model", "again"):
            found = on_disk(tmp_path, tag, name)
            assert all(torch.equal(found[key], tensor) for key, tensor in state.items())


def test_memory_that_was_given_back_and_taken_anew_before_its_copy_was_queued_is_torn(
    tmp_path: Path, held_copies: Any
) -> None:
    weight, optimizer = guarded()
    with engine(tmp_path) as made:
        made.guard(optimizer)
        held = held_copies(made)
        pending = saved(made, "t", model={"w": weight.detach()})
        storage = weight.untyped_storage()
        storage.resize_(0)
        taken = torch.full((SIZE,), 7.0, device=DEVICE)
        storage.resize_(SIZE * 4)
        held.let_go()
        with pytest.raises(TornSnapshotError, match="given back and taken anew"):
            pending.result(TIMEOUT_S)
        assert distinct(taken) == [7]
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("when", ["before guard", "after guard"])
def test_an_optimizer_that_may_be_replayed_is_saved_eagerly_and_that_is_said(
    tmp_path: Path, any_mode: str, when: str
) -> None:
    weight = torch.nn.Parameter(torch.ones(SIZE, device=DEVICE))
    optimizer = torch.optim.Adam([weight], lr=1.0, capturable=when == "before guard")
    with engine(tmp_path) as made:
        if when == "before guard":
            with pytest.warns(RuntimeWarning, match="saved eagerly"):
                made.guard(optimizer)
        else:
            made.guard(optimizer)
            optimizer.param_groups[0]["capturable"] = True
        pending = saved(made, "t", model={"w": weight.detach()})
        with torch.no_grad():
            weight.add_(1)
        pending.result(TIMEOUT_S)
        assert pending.metrics.saves[0].mode == "eager"
    assert distinct(on_disk(tmp_path, "t")["w"]) == [1]


def test_a_step_that_was_captured_is_noticed(tmp_path: Path, simulator: Any) -> None:
    weight, optimizer = guarded()
    graph = Graph()
    with engine(tmp_path) as made:
        made.guard(optimizer)
        made.prewarm()
        with pytest.warns(RuntimeWarning, match="saved eagerly"), simulator.capture(graph):
            optimizer.step()
        for step in range(3):
            pending = saved(made, f"{step}", model={"w": weight.detach()})
            graph.replay()
            pending.result(TIMEOUT_S)
            assert pending.metrics.saves[0].mode == "eager"
    assert [distinct(on_disk(tmp_path, f"{step}")["w"]) for step in range(3)] == [[1], [0], [-1]]


def test_a_step_that_was_captured_before_its_optimizer_was_guarded_is_noticed(tmp_path: Path, simulator: Any) -> None:
    (_, other), (weight, optimizer) = guarded(), guarded()
    with engine(tmp_path) as made:
        made.guard(other)
        with simulator.capture(Graph()):
            optimizer.step()
        with pytest.warns(RuntimeWarning, match="saved eagerly"):
            made.guard(optimizer)
        pending = saved(made, "t", model={"w": weight.detach()})
        pending.result(TIMEOUT_S)
        assert pending.metrics.saves[0].mode == "eager"


def test_nothing_spoils_a_graph_that_another_thread_captures(tmp_path: Path, any_mode: str, simulator: Any) -> None:
    other = torch.ones(3, device=DEVICE)
    weight, optimizer = guarded()
    with simulator.captured_elsewhere(other) as graph:
        # All that a device is asked for, and all on the caller's thread or behind it: memory is pinned and unpinned,
        # streams are made, events waited for, chunks given up, device memory is taken.
        with engine(tmp_path) as made:
            made.prewarm()
            saved(made, "eager", model={"w": weight.detach(), "t": weight.detach().reshape(256, -1).t()}).result(
                TIMEOUT_S
            )
            made.guard(optimizer)
            pending = saved(made, "lazy", model={"w": weight.detach()})
            optimizer.step()
            pending.result(TIMEOUT_S)
            loaded = made.load("lazy/model.pt")["w"]
        stager = ArenaStager(num_slots=1)
        staged = stager.stage({"w": weight.detach()})["w"].clone()
        stager.close()
    graph.replay()
    assert (distinct(other), distinct(loaded), distinct(staged)) == ([22], [1], [0])
    assert distinct(on_disk(tmp_path, "eager")["w"]) == distinct(on_disk(tmp_path, "lazy")["w"]) == [1]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_load_that_would_spoil_another_threads_graph_is_refused(tmp_path: Path, simulator: Any) -> None:
    target, other = torch.ones(SIZE, device=DEVICE), torch.ones(3, device=DEVICE)
    committed(tmp_path, w=torch.full((SIZE,), 3.0))
    with engine(tmp_path) as made:
        save_sharded(made, "shards", {"w": torch.full((SIZE,), 3.0)}).result(TIMEOUT_S)
        with simulator.captured_elsewhere(other) as graph:
            with pytest.raises(TransactionStateError, match="while another thread captures a graph on it"):
                made.load_into({"w": target}, "t/model.pt")
            with pytest.raises(TransactionStateError, match="while another thread captures a graph on it"):
                load_sharded(made, "shards", {"w": target})
        graph.replay()
        assert (distinct(other), distinct(target)) == ([22], [1])
        made.load_into({"w": target}, "t/model.pt")
    assert distinct(target) == [3]


def test_a_step_inside_a_capture_is_refused_while_a_lazy_snapshot_is_in_flight(tmp_path: Path, simulator: Any) -> None:
    weight, optimizer = guarded()
    with engine(tmp_path) as made:
        made.guard(optimizer)
        made.prewarm()
        with simulator.paused():
            pending = saved(made, "t", model={"w": weight.detach()})

            def captured() -> None:
                with simulator.capture(Graph()):
                    optimizer.step()

            with (
                pytest.warns(RuntimeWarning, match="saved eagerly"),
                pytest.raises(TransactionStateError, match=r"call wait_snapshot\(\) before the capture"),
            ):
                captured()
        pending.result(TIMEOUT_S)
