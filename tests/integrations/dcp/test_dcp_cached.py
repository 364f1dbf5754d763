"""`save_sharded(plan="cached")`: a structure is planned once; later saves talk to nobody, and say what has changed."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import DefaultSavePlanner, state_dict_saver

from async_ckpt import AsyncCheckpointEngine, Catalog, CommitError, ConfigError, RankCoordinator
from async_ckpt.integrations.dcp import DcpReader, load_sharded, save_sharded
from async_ckpt.integrations.dcp.cached_plans import PlannedDestination, count_lacking
from async_ckpt.ranks.rank_requests import Add, RankInfo, one
from tests.integrations.dcp import work
from tests.integrations.dcp.test_dcp_ranks import assert_same
from tests.ranks.simulation import Simulation
from tests.support.processes import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "chunk_bytes": 8192}


@pytest.mark.wide
def test_no_collective_after_the_first_save_and_all_of_it_is_read_by_anybody(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    first, second = run_ranks(tmp_path / "p", 2, work.save_without_collectives, root)[0]
    catalog = Catalog(root)
    assert catalog.tags() == ["s0", "s300", "s70000"] and all(catalog.verify(tag).ok for tag in catalog.tags())
    for world_size, tag, how, expected in (
        (2, "s300", "stock", first),
        (1, "s70000", "stock", second),
        (1, "s300", "ours", first),
    ):
        for found, step, log in run_ranks(tmp_path / "p", world_size, work.load_saved, root, tag, how):
            assert_same(found, expected)
            assert (step, log) == (int(tag[1:]), [1, int(tag[1:]), "x"])


@pytest.mark.wide
@pytest.mark.parametrize("what", ["tensor", "key", "object"])
def test_what_changes_on_one_rank_fails_that_tag_on_all_and_the_next_is_planned_anew(tmp_path: Path, what: str) -> None:
    said = {
        "tensor": "another structure than before ('x.new')",
        "key": "'new'",
        "object": "'x.plain.steps' has outgrown",
    }[what]
    for told, tags in run_ranks(tmp_path / "p", 2, work.save_what_changes_on_one_rank, str(tmp_path / "root"), what):
        assert tags == ["a", "c", "d", "e"]
        assert [error is None for error in told] == [True, False, True, True, True]
        assert "rank 1: " in told[1] and said in told[1] and "plans anew" in told[1]


@pytest.mark.wide
def test_after_any_failure_all_ranks_plan_anew(tmp_path: Path) -> None:
    zero, one = run_ranks(tmp_path / "p", 2, work.save_while_one_disk_fails, str(tmp_path / "root"))
    assert zero == (["NoneType", "RankFailedError", "NoneType", "NoneType"], ["a", "c", "d"])
    assert one == (["NoneType", "WriteError", "NoneType", "NoneType"], ["a", "c", "d"])


@pytest.fixture
def plannings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each save that DCP plans."""
    made: list[int] = []
    real = state_dict_saver.save

    def counted(*args: Any, **kwargs: Any) -> Any:
        made.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(state_dict_saver, "save", counted)
    return made


def test_one_rank_plans_anew_by_itself(tmp_path: Path, plannings: list[int]) -> None:
    with AsyncCheckpointEngine(tmp_path, **SMALL) as engine:
        for tag, state, num in (
            ("a", {"x": torch.ones(3), "log": [0]}, 1),
            ("b", {"x": torch.ones(3) * 2, "log": list(range(50))}, 1),
            ("c", {"y": torch.ones(2)}, 2),
            # A structure that was planned before is not forgotten.
            ("d", {"x": torch.ones(3), "log": []}, 2),
            ("e", {"x": torch.ones(4), "log": []}, 3),
            ("f", {"x": torch.ones(4), "log": list(range(9000))}, 4),
            ("g", {"x": torch.zeros(4), "log": list(range(9000))}, 4),
        ):
            save_sharded(engine, tag, state).result(60)
            assert len(plannings) == num, tag
            into = {name: torch.empty_like(value) if name != "log" else None for name, value in state.items()}
            load_sharded(engine, tag, into)
            assert_same(into, state)
        assert engine.tags() == list("abcdefg")


def test_to_freeze_and_to_thaw_changes_no_plan(tmp_path: Path, plannings: list[int]) -> None:
    weight = torch.nn.Parameter(torch.zeros(100))
    with AsyncCheckpointEngine(tmp_path / "root", **SMALL) as engine:
        for step in range(4):
            weight.requires_grad_(step != 2)
            weight.data.fill_(step)
            save_sharded(engine, f"s{step}", {"weight": weight}).result(60)
        state = {"weight": torch.full((100,), -1.0)}
        load_sharded(engine, "s2", state)
    assert len(plannings) == 1 and bool((state["weight"] == 2).all())


def test_collective_plans_and_planners_of_ones_own_are_never_cached(tmp_path: Path, plannings: list[int]) -> None:
    with AsyncCheckpointEngine(tmp_path, **SMALL) as engine:
        state = {"x": torch.ones(3)}
        for tag, options in (("a", {"plan": "collective"}), ("b", {"plan": "collective"}), ("c", {}), ("d", {})):
            save_sharded(engine, tag, state, **options).result(60)  # type: ignore[arg-type]
        planner = DefaultSavePlanner()
        save_sharded(engine, "e", state, planner=planner).result(60)
        assert len(plannings) == 4
        with pytest.raises(ConfigError, match="plan must be 'cached' or 'collective'"):
            save_sharded(engine, "f", state, plan="cache")  # type: ignore[arg-type]


def test_votes_that_are_not_all_the_known_one(tmp_path: Path) -> None:
    where = PlannedDestination(str(tmp_path), "t", "abc")
    where.check_votes(["abc"] * 3)
    for votes, told in (
        (["abc", "!it grew", "abc"], r"\(rank 1: it grew\)"),
        (["abc", "", "abc"], r"\(rank 1: it goes by another plan"),
        (["abc", "abd"], r"\(rank 1: it goes by another plan"),
    ):
        with pytest.raises(CommitError, match=told) as caught:
            where.check_votes(votes)
        assert caught.value.step == "plan"


def test_the_store_does_not_grow_with_saves(tmp_path: Path) -> None:
    store = dist.HashStore()
    coordinator = RankCoordinator(store, 0, 1, run_id="r", linger_s=2.0)
    with AsyncCheckpointEngine(tmp_path, coordinator=coordinator, **SMALL) as engine:
        for k in range(6):
            save_sharded(engine, f"t{k}", {"x": torch.ones(3) * k}).result(60)
    assert store.num_keys() <= 5


@pytest.mark.wide
@pytest.mark.parametrize("world_size", [2, 1024, 16384])
def test_what_the_ranks_say_costs_the_same_for_each_of_them(world_size: int) -> None:
    info = [RankInfo(rank, world_size, 600.0) for rank in range(world_size)]
    # A plan that all have: one request each, and nobody waits.
    known = Simulation(world_size)
    known.run({rank: one(Add("plan/2", world_size + 1)) for rank in range(world_size)})
    assert set(known.store.by_rank.values()) == {1}
    assert max(known.ended_s.values()) < 1.0
    # The first save of a structure: all find out that all of them lack it.
    first = Simulation(world_size)
    first.run({rank: count_lacking(info[rank], "plan/1") for rank in range(world_size)})
    assert set(first.outcomes.values()) == {world_size}
    assert sum(first.store.requests.values()) <= 12 * world_size and max(first.ended_s.values()) < 30.0
    # One rank lacks it alone: it hears so, whoever comes first.
    mixed = Simulation(world_size)
    mixed.run({0: count_lacking(info[0], "plan/3"), 1: one(Add("plan/3", world_size + 1))})
    assert mixed.outcomes[0] > world_size
    # The vote is one word beside the digest.
    where = PlannedDestination("/r", "t", uuid.uuid4().hex)
    assert len(where.vote) == 32
    print(
        f"{world_size} ranks: known {max(known.ended_s.values()):.3f} s, first {max(first.ended_s.values()):.2f} s, "
        f"{sum(first.store.requests.values()) / world_size:.1f} requests per rank"
    )


class Meeting(DefaultSavePlanner):
    """Keeps what it is told of the place."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.told = storage_meta
        super().set_up_planner(state_dict, storage_meta, is_coordinator)


def test_a_planner_of_ones_own_is_told_where_the_checkpoint_goes(tmp_path: Path) -> None:
    planner = Meeting()
    with AsyncCheckpointEngine(tmp_path) as engine:
        save_sharded(engine, "a", {"x": torch.ones(3)}, planner=planner)
    assert planner.told.checkpoint_id == str(tmp_path / "a")
    assert DcpReader(tmp_path / "a").read_metadata().storage_meta.checkpoint_id == str(tmp_path / "a")
