"""Files that all ranks hold, written once by all of them: ranks as threads over a HashStore. See also
`test_replicated_processes`.
"""

from __future__ import annotations

import copy
import errno
import itertools
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from async_ckpt import (
    AsyncCheckpointEngine,
    Catalog,
    RankFailedError,
    TornSnapshotError,
    WriteError,
    load,
)
from async_ckpt.engine.replicated import Replica
from async_ckpt.plan.planner import Planner
from async_ckpt.ranks.rank_coordinator import Node
from async_ckpt.storage.filesystem import FileSystem
from tests.ranks.test_coordinator import engine_of, together
from tests.support.faulty_filesystem import FaultyFileSystem
from tests.support.mounts import mounted

from ..support.comparing import torch_bytes

CHUNK_BYTES = 4096
SIZES = (3, 5000, 17, 40_000, 1, 2, 3, 9000, 123, 64)


def state_of(step: int = 7) -> dict[str, Any]:
    numbers = torch.Generator().manual_seed(step)
    tensors = {f"layer.{k}": torch.randn(size, generator=numbers) for k, size in enumerate(SIZES)}
    return {"model": tensors, "step": step, "text": "x" * 300, "lr": 0.1}


def commit(
    root: Path,
    world_size: int,
    save: Callable[[AsyncCheckpointEngine, int], None],
    options: Mapping[int, Mapping[str, Any]] | None = None,
    **common: Any,
) -> list[Any]:
    """What the commit of "a" told each rank: its error or its metrics."""
    store = dist.HashStore()

    def work(rank: int) -> Any:
        more = {**common, **(options or {}).get(rank, {})}
        with engine_of(root, store, rank, world_size, **more) as engine:
            engine.create("a")
            save(engine, rank)
            pending = engine.commit("a")
            return pending.exception(20) or pending.metrics

    return together(world_size, work)


def save_all(engine: AsyncCheckpointEngine, rank: int) -> None:
    engine.save(state_of(), "d/m.pt", replicated=True)


@pytest.mark.parametrize(("world_size", "io_mode"), [(1, "auto"), (2, "auto"), (3, "direct"), (5, "auto")])
def test_the_file_is_what_torch_saves_and_each_rank_writes_its_share(
    tmp_path: Path, world_size: int, io_mode: str
) -> None:
    found = commit(tmp_path, world_size, save_all, io_mode=io_mode)
    expected = torch_bytes(state_of())
    assert (tmp_path / "a/d/m.pt").read_bytes() == expected
    written = [metrics.saves[0].written_bytes for metrics in found]
    assert sum(written) == len(expected)
    assert max(written) <= len(expected) / world_size + 2 * CHUNK_BYTES
    catalog = Catalog(tmp_path)
    assert catalog.verify("a").ok
    assert [(file.path, file.rank) for file in catalog.manifest("a").files] == [("d/m.pt", None)]
    assert torch.load(tmp_path / "a/d/m.pt")["step"] == 7


def test_later_saves_of_other_values_by_another_number_of_ranks(tmp_path: Path) -> None:
    for world_size, tags in ((3, ("a", "b", "c")), (2, ("d", "e"))):
        store = dist.HashStore()

        def work(rank: int, store: Any = store, world_size: int = world_size, tags: Any = tags) -> list[str]:
            with engine_of(tmp_path, store, rank, world_size, reuse="auto", rewrite=True) as engine:
                pending = []
                for number, tag in enumerate(tags):
                    engine.create(tag)
                    engine.save(state_of(1000**number), "m.pt", replicated=True)
                    engine.save({"own": rank}, f"{rank}.pt")
                    pending.append(engine.commit(tag, {"step": number}))
                return [commit.result(20) for commit in pending]

        assert together(world_size, work) == [list(tags)] * world_size
        for number, tag in enumerate(tags):
            assert (tmp_path / tag / "m.pt").read_bytes() == torch_bytes(state_of(1000**number))
            assert load(tmp_path / tag / f"{world_size - 1}.pt") == {"own": world_size - 1}
            assert Catalog(tmp_path).verify(tag).ok


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_direct_writes_of_several_ranks_on_every_file_system(tmp_path: Path, kind: str) -> None:
    """More than a mebibyte, and a length that is no whole page; one rank streams its share through few chunks."""
    state = {"w": torch.arange(700_001), "few": [torch.ones(k) for k in range(50)]}
    with mounted(kind, tmp_path, 400 << 20) as disk:
        few = {1: {"staging_bytes": 8 * CHUNK_BYTES}}
        found = commit(
            disk / "root",
            3,
            lambda engine, rank: engine.save(state, "m.pt", replicated=True),
            few,
            staging_bytes=8 << 20,
        )
        saves = [told.saves[0] for told in found]
        assert [(save.mode, save.direct) for save in saves] == [
            ("streamed" if rank == 1 else "eager", kind != "tmpfs") for rank in range(3)
        ]
        assert (disk / "root/a/m.pt").read_bytes() == torch_bytes(state)
        assert Catalog(disk / "root").verify("a").ok


def test_safetensors(tmp_path: Path) -> None:
    import safetensors.torch

    tensors = {name: tensor.to(torch.float64) for name, tensor in state_of()["model"].items()}
    commit(tmp_path, 3, lambda engine, rank: engine.save(tensors, "m.st", replicated=True, format="safetensors"))
    assert (tmp_path / "a/m.st").read_bytes() == safetensors.torch.save(tensors)
    assert Catalog(tmp_path).verify("a").ok


def test_a_guarded_optimizer_waits_for_the_share_alone(tmp_path: Path) -> None:
    states: list[bytes] = []

    first = torch.nn.Sequential(*(torch.nn.Linear(60, 60) for _ in range(4)))
    store = dist.HashStore()

    def work(rank: int) -> str:
        model = copy.deepcopy(first)
        optimizer = torch.optim.Adam(model.parameters())
        with engine_of(tmp_path, store, rank, 3) as engine:
            engine.guard(optimizer)
            for tag in ("a", "b"):
                model(torch.ones(2, 60)).sum().backward()
                optimizer.step()
                state = {"model": model.state_dict(), "optim": optimizer.state_dict()}
                if rank == 0:
                    states.append(torch_bytes(state))
                engine.create(tag)
                engine.save(state, "m.pt", replicated=True)
                pending = engine.commit(tag)
            optimizer.step()
            assert pending.metrics.saves[0].mode == "lazy"
            return pending.result(20)

    assert together(3, work) == ["b"] * 3
    assert [(tmp_path / tag / "m.pt").read_bytes() for tag in "ab"] == states


def test_a_torn_share_fails_the_commit_on_all_ranks(tmp_path: Path) -> None:
    first = torch.nn.Linear(300, 300)

    def save(engine: AsyncCheckpointEngine, rank: int) -> None:
        model = copy.deepcopy(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine.guard(optimizer)
        with engine._pipeline.snapshotter.deferring():
            engine.save(model.state_dict(), "m.pt", replicated=True)
            if rank == 1:
                model.weight.data.view(-1)[-1] += 1.0

    found = commit(tmp_path, 2, save)
    assert [type(error) for error in found] == [RankFailedError, TornSnapshotError]
    assert found[0].rank == 1
    assert Catalog(tmp_path).tags() == []


def change_step(state: dict[str, Any]) -> None:
    state["step"] = 8


def change_keys(state: dict[str, Any]) -> None:
    state["model"]["layer.9b"] = torch.zeros(3)


def change_shape(state: dict[str, Any]) -> None:
    state["model"]["layer.3"] = torch.zeros(40_001)


def change_value(state: dict[str, Any]) -> None:
    state["model"]["layer.3"] += 1


LIES: dict[Callable[[dict[str, Any]], None], str] = {
    change_step: "state['step']",
    change_keys: "layer.9",
    change_shape: "state['model']['layer.3']",
    change_value: "state['model']['layer.3']",
}


@pytest.mark.parametrize("liar", [0, 2])
@pytest.mark.parametrize("lie", LIES)
def test_ranks_that_differ_fail_the_commit_by_rank_and_key_path(
    tmp_path: Path, lie: Callable[[dict[str, Any]], None], liar: int
) -> None:
    def save(engine: AsyncCheckpointEngine, rank: int) -> None:
        state = state_of()
        if rank == liar:
            lie(state)
        engine.save(state, "m.pt", replicated=True)

    found = commit(tmp_path, 3, save)
    assert [type(error) for error in found] == [RankFailedError] * 3
    for error in found:
        assert LIES[lie] in str(error)
        named = str(error).rpartition("with replicated=True, but ")[2]
        assert named.startswith(f"rank {liar} holds" if lie is not change_value else "ranks ")
        assert str(liar) in named.partition(" hold")[0]
        assert error.committed is False
    assert list(tmp_path.iterdir()) == []


def test_small_files_are_compared_by_ranks_that_write_nothing(tmp_path: Path) -> None:
    def save(engine: AsyncCheckpointEngine, rank: int) -> None:
        engine.save({"w": torch.full((5,), float(rank == 2))}, "m.pt", replicated=True)

    found = commit(tmp_path, 3, save)
    assert all("ranks 0 and 2 hold different values of state['w']" in str(error) for error in found)


@pytest.mark.parametrize("how", ["not at all", "alone"])
def test_a_rank_that_does_not_save_it_so_is_named(tmp_path: Path, how: str) -> None:
    def save(engine: AsyncCheckpointEngine, rank: int) -> None:
        if rank != 1 or how == "alone":
            engine.save(state_of(), "m.pt", replicated=rank != 1)

    found = commit(tmp_path, 3, save)
    assert all(isinstance(error, (RankFailedError, WriteError)) for error in found), found
    assert isinstance(found[0], RankFailedError)
    if how == "not at all":
        assert "'m.pt' was saved with replicated=True, but not by rank 1" in str(found[0])
    assert Catalog(tmp_path).tags() == []


class Kind(FileSystem):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def fs_type(self, path: str) -> str:
        return self._kind


@pytest.mark.parametrize(("kind", "num_writers"), [("nfs4", 1), ("lustre", 3)])
def test_rank_0_writes_all_where_writes_of_others_may_be_seen_late(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, num_writers: int
) -> None:
    caplog.set_level(logging.WARNING, "async_ckpt")

    def save(engine: AsyncCheckpointEngine, rank: int) -> None:
        engine.save(state_of(), "m.pt", replicated=True)
        engine.save(state_of(), "n.pt", replicated=True)

    found = commit(tmp_path, 3, save, {rank: {"filesystem": Kind(kind)} for rank in range(3)})
    assert [metrics.saves[0].written_bytes > 0 for metrics in found] == [rank < num_writers for rank in range(3)]
    assert (tmp_path / "a/m.pt").read_bytes() == (tmp_path / "a/n.pt").read_bytes() == torch_bytes(state_of())
    told = [record for record in caplog.records if "rank 0 writes" in record.getMessage()]
    assert len(told) == (1 if num_writers == 1 else 0)


def test_ranks_that_see_other_kinds_of_file_system_are_refused(tmp_path: Path) -> None:
    found = commit(tmp_path, 2, save_all, {1: {"filesystem": Kind("nfs4")}})
    assert all("is cut otherwise" in str(error) and "rank 1" in str(error) for error in found)


def test_each_node_with_a_root_of_its_own_has_the_file(tmp_path: Path) -> None:
    nodes = {rank: Node(rank // 2, 2, (0, 1) if rank < 2 else (2, 3)) for rank in range(4)}
    store = dist.HashStore()

    def work(rank: int) -> str:
        with engine_of(tmp_path / f"node{rank // 2}", store, rank, 4, nodes[rank]) as engine:
            engine.create("a")
            engine.save(state_of(), "m.pt", replicated=True)
            return engine.commit("a").result(20)

    assert together(4, work) == ["a"] * 4
    for node in range(2):
        assert (tmp_path / f"node{node}/a/m.pt").read_bytes() == torch_bytes(state_of())


class FailingAmend(FileSystem):
    def amend(self, path: str, size_bytes: int, changes: Any) -> list[bytes]:
        raise WriteError("the disk failed", path=path)


def test_a_file_that_cannot_be_made_whole_is_not_committed(tmp_path: Path) -> None:
    found = commit(tmp_path, 2, save_all, {0: {"filesystem": FailingAmend()}})
    assert [type(error) for error in found] == [WriteError, RankFailedError]
    assert list(tmp_path.iterdir()) == []


def kind_of(error: Exception) -> str:
    return "unknown" if getattr(error, "committed", False) is None else "failed"


@pytest.mark.wide
@pytest.mark.parametrize("failing", [0, 1])
def test_a_disk_that_fails_at_any_call(tmp_path: Path, failing: int) -> None:
    """Either all ranks have committed a file that is right, or none has."""
    outcomes: set[str] = set()
    expected = torch_bytes(state_of())
    for k in itertools.count():
        disk, root = FaultyFileSystem(), tmp_path / str(k)

        def save(engine: AsyncCheckpointEngine, rank: int, disk: FaultyFileSystem = disk, k: int = k) -> None:
            if rank == failing:
                disk.fail_at(k, errno.EIO)
            engine.save(state_of(), "m.pt", replicated=True)

        found = commit(root, 2, save, {failing: {"filesystem": disk}}, preflight=False, sweep_on_start=False)
        outcome = {"committed" if not isinstance(told, Exception) else kind_of(told) for told in found}
        assert len(outcome) == 1, (k, found)
        outcomes |= outcome
        if outcome != {"failed"}:
            assert (root / "a/m.pt").read_bytes() == expected
            assert Catalog(root).verify("a").ok
        else:
            assert Catalog(root).tags() == []
        if all(op.outcome != "EIO" for op in disk.operations):
            break
    assert outcomes >= {"failed", "committed"}
    assert k > (12 if failing == 0 else 6)


class Flipping(FileSystem):
    """Flips a bit of the file behind the writer's back."""

    def amend(self, path: str, size_bytes: int, changes: Any) -> list[bytes]:
        before = super().amend(path, size_bytes, changes)
        with open(path, "r+b") as file:
            file.seek(5000)
            byte = file.read(1)
            file.seek(5000)
            file.write(bytes([byte[0] ^ 1]))
        return before


def test_read_back_reads_the_whole_file_before_the_rename(tmp_path: Path) -> None:
    found = commit(tmp_path, 2, save_all, {0: {"filesystem": Flipping()}}, read_back=True)
    assert all(isinstance(error, Exception) for error in found)
    assert Catalog(tmp_path).tags() == []


def test_the_numbers_of_a_ranks_own_devices_are_no_difference() -> None:
    def plan_on(rank: int, devices: bool = True) -> str:
        state = Planner().plan({"w": torch.ones(3), "where": f"cuda:{rank}"})
        if devices:
            state = replace(state, devices=frozenset({torch.device(f"cuda:{rank}")}))
        return Replica("m.pt", state, CHUNK_BYTES, rank, 2, reads_back=False).tell()["plan"]

    assert plan_on(0) == plan_on(1)
    assert plan_on(0, devices=False) != plan_on(1, devices=False)
