"""Files that all ranks hold, written by real processes: whatever one of them does, the file is whole, or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from async_ckpt import AsyncCheckpointEngine, Catalog, RankCoordinator, load
from tests.ranks.jobs import REPLICATED, Job, Scenario, ran, side_by_side, state_of
from tests.ranks.test_lost_ranks import GRACE_S, SHORT_S, launched_store
from tests.support.comparing import torch_bytes
from tests.support.processes import run_ranks

NUMEL = 60_000


def job_of(folder: Path, store: dist.TCPStore, world_size: int, **options: Any) -> Job:
    address = f"127.0.0.1:{store.port}"
    paths = str(folder / "root"), str(folder / f"results{world_size}")
    return Job(*paths, world_size, address, numel=NUMEL, replicated=True, linger_s=0.5, **options)


def assert_whole(root: str, tags: list[str], world_size: int) -> None:
    catalog = Catalog(root)
    assert catalog.tags() == tags
    for tag in tags:
        assert catalog.verify(tag).ok
        files = {entry.path: entry.rank for entry in catalog.manifest(tag).files}
        assert files == {REPLICATED: None} | {f"rank{rank}.pt": rank for rank in range(world_size)}
        assert (catalog.path(tag) / REPLICATED).read_bytes() == torch_bytes(state_of(0, tag, NUMEL))
    assert [name for name in os.listdir(root) if name.startswith(".")] == []


@pytest.mark.wide
@pytest.mark.parametrize("world_size", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_processes_write_one_file(tmp_path: Path, world_size: int) -> None:
    def scenario() -> Scenario:
        store = launched_store()
        job = job_of(tmp_path, store, world_size)
        plan = [("a", "commit"), ("b", "commit"), ("c", "commit")]
        for learnt in (yield from ran(job, [plan] * world_size)):
            assert [record["outcome"] for record in learnt] == ["ok"] * 3 + ["closed"]
        assert_whole(job.root, ["a", "b", "c"], world_size)

    raise_all(side_by_side({"": scenario()}, 1))


def raise_all(ended: dict[str, BaseException | None]) -> None:
    for error in ended.values():
        if error is not None:
            raise error


def a_rank_is_killed(folder: Path, act: str, killed: int) -> Scenario:
    """All others fail within the timeout and nothing is visible; then another number of ranks saves the same tag."""
    store = launched_store()
    job = job_of(folder, store, 3, timeout_s=SHORT_S, run_id="first")
    plans = [[("a", "commit"), ("b", act if rank == killed else "commit")] for rank in range(3)]
    learnt = yield from ran(job, plans, [-9 if rank == killed else 0 for rank in range(3)])
    for rank in {0, 1, 2} - {killed}:
        record = learnt[rank][1]
        assert (record["outcome"], record["committed"]) == ("RankFailedError", False), record
        assert record["blamed"] == killed
        assert record["s"] < 2 * SHORT_S + GRACE_S
    assert Catalog(job.root).tags() == ["a"]
    for world_size, tag in ((2, "b"), (4, "c")):
        again = job_of(folder, store, world_size, run_id=tag)
        for learnt_again in (yield from ran(again, [[(tag, "commit")]] * world_size)):
            assert [record["outcome"] for record in learnt_again] == ["ok", "closed"]
    catalog = Catalog(job.root)
    assert catalog.tags() == ["a", "b", "c"]
    assert all(catalog.verify(tag).ok for tag in "abc")
    assert load(catalog.path("c") / REPLICATED)["x"].equal(state_of(0, "c", NUMEL)["x"])
    assert [name for name in os.listdir(job.root) if name.startswith(".")] == []


def a_rank_lies(folder: Path) -> Scenario:
    """One tensor of one rank is another: all learn which ranks and which tensor, and the next checkpoint works."""
    store = launched_store()
    job = job_of(folder, store, 4)
    good = [("a", "commit"), ("b", "commit"), ("c", "commit")]
    learnt = yield from ran(job, [good, good, [("a", "commit"), ("b", "lie"), ("c", "commit")], good])
    for rank in range(4):
        assert [record["outcome"] for record in learnt[rank]] == ["ok", "RankFailedError", "ok", "closed"]
        assert "ranks 1 and 2 hold different values of state['x']" in learnt[rank][1]["message"]
    assert_whole(job.root, ["a", "c"], 4)


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseException | None]:
    acts = {
        "die early": 2,
        "death before share": 1,
        "die": 0,
        "death before report": 1,
        "death before share of rank 0": 0,
        "death before report of rank 0": 0,
    }
    scenarios: dict[str, Callable[[Path], Scenario]] = {"lie": a_rank_lies}
    for name, killed in acts.items():
        scenarios[name] = partial(a_rank_is_killed, act=name.removesuffix(" of rank 0"), killed=killed)
    return side_by_side({name: run(tmp_path_factory.mktemp("job")) for name, run in scenarios.items()}, 4)


@pytest.mark.wide
@pytest.mark.parametrize(
    "name",
    [
        "lie",
        "die early",
        "death before share",
        "die",
        "death before report",
        "death before share of rank 0",
        "death before report of rank 0",
    ],
)
def test_a_rank_is_lost_or_lies(lost: dict[str, BaseException | None], name: str) -> None:
    if (error := lost[name]) is not None:
        raise error


# Replicas as they come out of training.


def trained(rank: int, world_size: int, kind: str) -> tuple[dict[str, Any], Any]:
    """The state of a model that ranks with different data have trained for two steps."""
    torch.manual_seed(0)
    model: Any = torch.nn.Sequential(torch.nn.Linear(40, 300), torch.nn.BatchNorm1d(300), torch.nn.Linear(300, 8))
    if kind == "ddp":
        model = DistributedDataParallel(model)
    else:
        model[1] = torch.nn.Identity()
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicas", "shards")))
    optimizer = torch.optim.AdamW(model.parameters())
    for step in range(2):
        data = torch.Generator().manual_seed(100 * rank + step)
        model(torch.randn(16, 40, generator=data)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if kind == "ddp":
        return {"model": dict(model.module.named_parameters()), "optimizer": optimizer.state_dict()}, optimizer
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}, optimizer


def save_trained(rank: int, folder: str, kind: str) -> bytes:
    """What torch makes of this rank's own state."""
    state, optimizer = trained(rank, dist.get_world_size(), kind)
    coordinator = RankCoordinator.from_env(run_id=kind)
    options: dict[str, Any] = {"chunk_bytes": 4096, "staging_bytes": 1 << 20, "coordinator": coordinator}
    with AsyncCheckpointEngine(f"{folder}/root", **options) as engine:
        engine.guard(optimizer)
        engine.create("a")
        engine.save(state, "train.pt", replicated=True)
        engine.commit("a").result(30)
    return torch_bytes(state)


@pytest.mark.wide
@pytest.mark.parametrize("kind", ["ddp", "mesh"])
def test_replicas_that_were_trained(tmp_path: Path, kind: str) -> None:
    own = run_ranks(tmp_path / "ranks", 4, save_trained, str(tmp_path), kind)
    whole = (tmp_path / "root/a/train.pt").read_bytes()
    assert len(whole) > 12 * 4096
    assert own == [whole] * 4
    assert Catalog(tmp_path / "root").verify("a").ok
