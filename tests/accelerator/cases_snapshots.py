"""What saves and loads promise, on a device and under every schedule."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from async_ckpt.errors import CheckpointError, ConfigError, TransactionStateError, UnsupportedStateError
from async_ckpt.host import device as devices
from async_ckpt.ranks.rank_coordinator import RankCoordinator
from tests.ranks.test_coordinator import together
from tests.support.insides import arena_of

from .common import DEVICE, OTHER, SIZE, TIMEOUT_S, all_chunks, busy, distinct, engine, guarded, on, on_disk, saved
from .simulator import Graph


@pytest.mark.parametrize("is_default", [True, False], ids=["default stream", "own stream"])
@pytest.mark.parametrize("device", [DEVICE, OTHER], ids=str)
def test_kernels_before_the_save_are_in_it_and_kernels_after_are_not(
    tmp_path: Path, any_mode: str, device: torch.device, is_default: bool
) -> None:
    with engine(tmp_path) as made, on(torch.accelerator.current_stream(device) if is_default else torch.Stream(device)):
        weight = torch.zeros(SIZE, device=device)
        busy(device)
        weight.add_(1)
        pending = saved(made, "t", model={"w": weight})
        weight.add_(1)
        pending.result(TIMEOUT_S)
        assert distinct(weight) == [2]
    assert distinct(on_disk(tmp_path, "t")["w"]) == [1]


def test_a_guarded_step_is_queued_behind_the_copies(tmp_path: Path, any_mode: str) -> None:
    weight, optimizer = guarded()
    with engine(tmp_path) as made:
        made.guard(optimizer)
        for step in range(4):
            busy(DEVICE)
            pending = saved(made, f"{step}", model={"w": weight.detach()}, optim=optimizer.state_dict())
            optimizer.step()
            pending.result(TIMEOUT_S)
            assert pending.metrics.saves[0].mode == "lazy" and pending.metrics.saves[0].pinned
    assert [distinct(on_disk(tmp_path, f"{step}")["w"]) for step in range(4)] == [[1.0 - step] for step in range(4)]


def test_ranks_on_devices_of_their_own_write_one_file(tmp_path: Path, any_mode: str) -> None:
    store = dist.HashStore()

    def work(rank: int) -> str:
        device = (DEVICE, OTHER)[rank]
        with engine(tmp_path, coordinator=RankCoordinator(store, rank, 2, timeout_s=TIMEOUT_S)) as made:
            made.create("t")
            made.save({"w": torch.arange(SIZE, device=device), "step": 3}, "model.pt", replicated=True)
            pending = made.commit("t")
            return pending.result(TIMEOUT_S)

    assert together(2, work) == ["t", "t"]
    assert on_disk(tmp_path, "t")["w"].equal(torch.arange(SIZE))
    assert str(OTHER).encode() not in (tmp_path / "t/model.pt").read_bytes() or DEVICE == OTHER


def test_an_adam_training_is_saved_as_it_was_at_each_save(tmp_path: Path, any_mode: str) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.BatchNorm1d(64), torch.nn.Linear(64, 8)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    wanted = {}
    with engine(tmp_path) as made:
        made.guard(optimizer)
        for step in range(4):
            optimizer.zero_grad()
            model(torch.randn(16, 32, device=DEVICE)).square().mean().backward()
            optimizer.step()
            pending = saved(made, f"{step}", model=model.state_dict(), optim=optimizer.state_dict())
            wanted[step] = {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}
        pending.result(TIMEOUT_S)
    for step, state in wanted.items():
        found = on_disk(tmp_path, f"{step}")
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_two_optimizers_on_two_devices(tmp_path: Path, any_mode: str) -> None:
    pairs = [guarded(1.0, DEVICE), guarded(5.0, OTHER)]
    with engine(tmp_path) as made:
        made.guard(*(optimizer for _, optimizer in pairs))
        for step in range(3):
            a, b = (weight.detach() for weight, _ in pairs)
            pending = saved(made, f"{step}", model={"a": a, "b": b}, other={"b": b})
            for _, optimizer in pairs:
                optimizer.step()
        pending.result(TIMEOUT_S)
    for step in range(3):
        found = on_disk(tmp_path, f"{step}")
        assert (distinct(found["a"]), distinct(found["b"])) == ([1.0 - step], [5.0 - step])


def test_threads_with_streams_of_their_own(tmp_path: Path, any_mode: str) -> None:
    with engine(tmp_path) as made, ThreadPoolExecutor(3) as threads:

        def train(number: int) -> None:
            with on(torch.Stream(DEVICE if number % 2 else OTHER)) as stream:
                weight = torch.full((SIZE,), float(number), device=stream.device)
                for step in range(3):
                    made.create(f"{number}-{step}")
                    made.save({"w": weight}, f"{made.root}/{number}-{step}/model.pt")
                    pending = made.commit(f"{number}-{step}")
                    weight.add_(10)
                    pending.result(TIMEOUT_S)

        list(threads.map(train, range(3)))
    for number in range(3):
        assert [distinct(on_disk(tmp_path, f"{number}-{step}")["w"]) for step in range(3)] == [
            [number + 10 * step] for step in range(3)
        ]


def test_sources_that_the_caller_drops_are_kept_until_they_are_copied(tmp_path: Path, any_mode: str) -> None:
    weight, optimizer = guarded()
    with engine(tmp_path) as made:
        made.guard(optimizer)
        pending = saved(made, "t", model={"w": weight.detach(), "fresh": torch.full((SIZE,), 2.0, device=DEVICE)})
        del weight, optimizer
        others = [torch.full((SIZE,), 9.0, device=DEVICE) for _ in range(8)]
        pending.result(TIMEOUT_S)
    found = on_disk(tmp_path, "t")
    assert (distinct(found["w"]), distinct(found["fresh"]), distinct(others[0])) == ([1], [2], [9])


def test_views_shared_storages_and_cpu_tensors_beside(tmp_path: Path, any_mode: str) -> None:
    base = torch.arange(SIZE, dtype=torch.float32, device=DEVICE).reshape(256, -1)
    state = {
        "base": base,
        "transposed": base.t(),
        "row": base[3],
        "half": base.to(torch.bfloat16)[::2],
        "conj": torch.view_as_complex(base.reshape(-1, 2) * 1).conj(),
        "cpu": torch.arange(77),
        "empty": torch.empty(0, device=DEVICE),
        "other": base.to(OTHER),
        "scalar": torch.tensor(3, device=DEVICE),
        "sparse": torch.eye(4).to_sparse(),
        "number": 3,
    }
    wanted = {name: tensor.cpu().clone() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    with engine(tmp_path) as made:
        saved(made, "t", model=state).result(TIMEOUT_S)
        for loaded in (
            torch.load(tmp_path / "t" / "model.pt"),
            made.load("t/model.pt"),
            made.load("t/model.pt", map_location="cpu"),
        ):
            assert all(torch.equal(loaded[name].cpu().to_dense(), tensor.to_dense()) for name, tensor in wanted.items())
            assert loaded["transposed"].untyped_storage().data_ptr() == loaded["base"].untyped_storage().data_ptr()
        assert made.load("t/model.pt")["other"].device == OTHER


@pytest.mark.parametrize("options", [{"format": "safetensors"}, {"compact_views": True}], ids=str)
@pytest.mark.parametrize("is_lazy", [True, False], ids=["lazy", "eager"])
def test_tensors_with_gaps_are_put_in_order_on_their_device(
    tmp_path: Path, any_mode: str, no_host_sync: Any, options: dict[str, Any], is_lazy: bool
) -> None:
    base = torch.arange(4 * SIZE, dtype=torch.float32).reshape(512, -1)
    owners = [torch.nn.Parameter(base.to(device)) for device in (DEVICE, OTHER)]
    state = {f"{k}": owner.detach()[:, 3:300].t() for k, owner in enumerate(owners)}
    owners.append(torch.nn.Parameter(torch.view_as_complex(base.reshape(-1, 64, 2)).to(DEVICE)))
    state["complex"] = owners[2].detach()[:, :7].conj()
    state["host"] = base[:, 1:7]
    wanted = {name: tensor.cpu().clone() for name, tensor in state.items()}
    optimizer = torch.optim.SGD(owners, lr=1.0)
    with engine(tmp_path, **options) as made:
        if is_lazy:
            made.guard(optimizer)
        made.prewarm()
        for owner in owners:
            owner.grad = torch.ones_like(owner)
        with no_host_sync() if is_lazy else contextlib.nullcontext():
            pending = saved(made, "t", model=state)
            optimizer.step()
        pending.result(TIMEOUT_S)
        assert pending.metrics.saves[0].mode == ("lazy" if is_lazy else "eager")
        found = made.load("t/model.pt")
    for name, tensor in wanted.items():
        assert torch.equal(found[name].cpu(), tensor), name


def test_a_file_is_byte_for_byte_what_torch_saves(tmp_path: Path, any_mode: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64)).to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 64, device=DEVICE)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optim": optimizer.state_dict(), "other": torch.ones(3, device=OTHER)}
    with engine(tmp_path) as made:
        for tag in ("planned", "from the cache"):
            saved(made, tag, model=state).result(TIMEOUT_S)
            with (tmp_path / "torch.pt").open("wb") as file:
                torch.save(state, file)
            assert (tmp_path / tag / "model.pt").read_bytes() == (tmp_path / "torch.pt").read_bytes()


@pytest.mark.parametrize("is_pinned", [True, False])
def test_a_state_larger_than_the_staging_memory_streams_through(tmp_path: Path, any_mode: str, is_pinned: bool) -> None:
    state = {f"w{k}": torch.full((SIZE,), float(k), device=DEVICE) for k in range(16)}
    with engine(tmp_path, staging_bytes=1 << 20, pin_memory=is_pinned) as made:
        pending = saved(made, "t", model=state)
        for tensor in state.values():
            tensor.zero_()
        pending.result(TIMEOUT_S)
        assert (pending.metrics.saves[0].mode, pending.metrics.saves[0].pinned) == ("streamed", is_pinned)
    found = on_disk(tmp_path, "t")
    assert [distinct(found[f"w{k}"]) for k in range(16)] == [[k] for k in range(16)]


@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize("map_location", [None, "cpu", str(OTHER)])
def test_load_and_load_into_give_what_was_saved(tmp_path: Path, any_mode: str, format: Any, map_location: Any) -> None:
    wanted = torch.randn(SIZE, device=DEVICE).cpu()
    with engine(tmp_path, format=format) as made:
        saved(made, "t", model={"w": wanted.to(DEVICE)}).result(TIMEOUT_S)
        loaded = made.load("t/model.pt", map_location=map_location)["w"]
        assert torch.equal(loaded.cpu(), wanted)
        target = torch.zeros(SIZE, device=OTHER)
        made.load_into({"w": target}, "t/model.pt")
        assert torch.equal(target.cpu(), wanted)


def test_a_device_that_registers_nothing_gets_chunks_that_it_has_pinned_itself(
    tmp_path: Path, any_mode: str, monkeypatch: Any
) -> None:
    monkeypatch.delitem(devices.drivers, DEVICE.type, raising=False)
    weight, optimizer = guarded()
    with engine(tmp_path) as made:
        made.guard(optimizer)
        made.prewarm()
        with all_chunks(made) as chunks:
            assert all(chunk.tensor.is_pinned() and chunk.address % 4096 == 0 for chunk in chunks)
        pending = saved(made, "t", model={"w": weight.detach()})
        pending.result(TIMEOUT_S)
        assert pending.metrics.saves[0].pinned
    assert distinct(on_disk(tmp_path, "t")["w"]) == [1]


def test_a_device_without_pinned_memory_works_with_pageable_chunks_and_the_metrics_say_so(
    tmp_path: Path, any_mode: str, monkeypatch: Any, simulator: Any
) -> None:
    monkeypatch.delitem(devices.drivers, DEVICE.type, raising=False)
    simulator.extension.set_has_pinned_memory(False)
    try:
        weight, optimizer = guarded()
        with engine(tmp_path) as made:
            made.guard(optimizer)
            pending = saved(made, "t", model={"w": weight.detach()})
            optimizer.step()
            pending.result(TIMEOUT_S)
            assert not pending.metrics.saves[0].pinned
            assert distinct(made.load("t/model.pt")["w"]) == [1]
        with pytest.raises(ConfigError, match="pin_memory=True, but this device pins no memory"):
            engine(tmp_path, pin_memory=True)
    finally:
        simulator.extension.set_has_pinned_memory(True)


@pytest.mark.parametrize("format", ["torch", "safetensors"])
def test_a_device_whose_bytes_cannot_be_copied_is_refused_by_its_name(
    tmp_path: Path, monkeypatch: Any, format: Any
) -> None:
    with engine(tmp_path) as made:
        made.create("t")
        with monkeypatch.context() as patched:
            # As of the devices that torch does not count among its accelerators, such as XLA.
            patched.setattr(torch.accelerator, "current_accelerator", lambda *_: None)
            with pytest.raises(UnsupportedStateError, match=rf"'w'.*device '?{DEVICE}"):
                made.save({"w": torch.ones(3, device=DEVICE)}, "model.pt", format=format)
        made.save({"w": torch.ones(3, device=DEVICE)}, "model.pt")
        made.commit("t").result(TIMEOUT_S)
    assert distinct(on_disk(tmp_path, "t")["w"]) == [1]


def test_a_device_with_one_stream_only_is_ordered_by_it(tmp_path: Path, any_mode: str, simulator: Any) -> None:
    weight, optimizer = guarded()
    with engine(tmp_path) as made, simulator.inject("stream", after=0):
        made.guard(optimizer)
        pending = saved(made, "t", model={"w": weight.detach(), "v": weight.detach() * 2})
        optimizer.step()
        pending.result(TIMEOUT_S)
    found = on_disk(tmp_path, "t")
    assert (distinct(found["w"]), distinct(found["v"])) == ([1], [2])


def test_a_save_or_load_inside_a_graph_capture_is_refused_and_harms_nothing(tmp_path: Path, simulator: Any) -> None:
    weight = torch.ones(SIZE, device=DEVICE)
    with engine(tmp_path) as made:
        made.prewarm()
        saved(made, "s", model={"w": weight}).result(TIMEOUT_S)
        made.create("t")
        graph = Graph()
        with simulator.capture(graph):
            weight.add_(1)
            with pytest.raises(TransactionStateError, match="while a graph is being captured on 'simulated:0'"):
                made.save({"w": weight}, "model.pt")
            with pytest.raises(TransactionStateError, match="while a graph is being captured"):
                made.load_into({"w": weight}, "s/model.pt")
            weight.add_(1)
        made.save({"w": weight}, "model.pt")
        graph.replay()
        made.commit("t").result(TIMEOUT_S)
        assert distinct(weight) == [3]
    assert distinct(on_disk(tmp_path, "t")["w"]) == [1]


def test_memory_is_not_pinned_inside_a_graph_capture(tmp_path: Path, simulator: Any) -> None:
    with engine(tmp_path, staging_bytes=1 << 20) as made:
        made.prewarm(0)
        with all_chunks(made):
            pass
        arena = type(arena_of(made))(2, 64 << 10, pinning=arena_of(made).pinning)
        with (
            simulator.capture(Graph()),
            pytest.raises(TransactionStateError, match="staging memory cannot be pinned while a graph"),
        ):
            arena.fault_in(1)
        arena.fault_in(2 * 64 << 10)
        arena.close()


KINDS = ("copy", "event", "run", "alloc")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_lazy", [True, False], ids=["lazy", "eager"])
def test_a_failing_call_publishes_nothing_and_gives_every_chunk_back(
    tmp_path: Path, simulator: Any, kind: str, is_lazy: bool
) -> None:
    weight, optimizer = guarded()
    num_failed = 0
    for after in range(12):
        root = tmp_path / f"{after}"
        made = engine(root)
        if is_lazy:
            made.guard(optimizer)
        made.prewarm()
        simulator.extension.inject(kind, after)
        try:
            saved(
                made, "t", model={"w": weight.detach(), "v": weight.detach() * 1}, other={"w": weight.detach()}
            ).result(TIMEOUT_S)
        except (CheckpointError, RuntimeError):
            num_failed += 1
            assert not (root / "t").exists()
        else:
            assert distinct(on_disk(root, "t")["w"]) == [1]
        simulator.extension.drain()
        simulator.extension.take_back_injected()
        with contextlib.suppress(CheckpointError, RuntimeError):
            made.close()
        assert arena_of(made).num_taken == 0
        assert not (root / "t").exists() or distinct(on_disk(root, "t")["w"]) == [1]
        del made
    assert num_failed
