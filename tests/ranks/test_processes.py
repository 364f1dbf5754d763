"""Real processes over a TCPStore and a FileStore: one outcome on every rank, whatever one of them does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from async_ckpt import Catalog, load
from tests.ranks.jobs import Job, Plan, Processes, state_of


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def make_job(tmp_path: Path, store: Any, world_size: int, **options: Any) -> Job:
    address = store if isinstance(store, str) else f"127.0.0.1:{store.port}"
    return Job(str(tmp_path / "root"), str(tmp_path / "results"), world_size, address, **options)


def assert_whole(root: str, tags: list[str], ranks: list[int], numel: int = 3000) -> None:
    catalog = Catalog(root)
    assert catalog.tags() == tags
    for tag in tags:
        assert catalog.verify(tag).ok
        assert {(entry.path, entry.rank) for entry in catalog.manifest(tag).files} == {
            (f"rank{r}.pt", r) for r in ranks
        }
        for rank in ranks:
            state, expected = load(catalog.path(tag) / f"rank{rank}.pt"), state_of(rank, tag, numel)
            assert state["tag"] == tag
            assert state["x"].equal(expected["x"])


def run(job: Job, plans: list[Plan], codes: list[int] | None = None) -> list[list[dict[str, Any]]]:
    processes = Processes(job, plans)
    assert processes.join() == (codes or [0] * job.world_size)
    return [processes.learnt(rank) for rank in range(job.world_size)]


@pytest.mark.wide
@pytest.mark.parametrize("world_size", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_every_rank_commits_into_one_directory(tmp_path: Path, store: Any, world_size: int) -> None:
    job = make_job(tmp_path, store, world_size)
    if world_size == 1:
        job = make_job(tmp_path, store, 1, run_id="alone")
    plan = [("a", "commit"), ("b", "commit"), ("c", "commit")]
    for learnt in run(job, [plan] * world_size):
        assert [record["outcome"] for record in learnt] == ["ok"] * 3 + ["closed"]
    ranks = list(range(world_size))
    catalog = Catalog(job.root)
    assert catalog.tags() == ["a", "b", "c"]
    if world_size > 1:
        assert_whole(job.root, ["a", "b", "c"], ranks)
    # Two counters for the run, one that the store itself keeps: it does not grow with checkpoints.
    assert store.num_keys() <= 3


FAILURES = {
    "raise": ("raised", "aborted by its owner because of ZeroDivisionError: by hand"),
    "full": ("OutOfSpaceError", "disk is full"),
}


@pytest.mark.wide
@pytest.mark.parametrize("act", FAILURES)
def test_a_failing_rank_fails_the_commit_on_all_and_the_next_one_works(tmp_path: Path, store: Any, act: str) -> None:
    own, cause = FAILURES[act]
    job = make_job(tmp_path, store, 3)
    good = [("a", "commit"), ("b", "commit"), ("c", "commit")]
    learnt = run(job, [good, good, [("a", "commit"), ("b", act), ("c", "commit")]])
    for rank in (0, 1):
        record = learnt[rank][1]
        assert (record["outcome"], record["blamed"], record["committed"]) == ("RankFailedError", 2, False)
        assert cause in record["message"]
        assert "older ones are untouched" in record["message"]
        assert record["s"] < job.timeout_s
    assert learnt[2][1]["outcome"] == own
    assert [[record["outcome"] for record in rank][2:] for rank in learnt] == [["ok", "closed"]] * 3
    assert_whole(job.root, ["a", "c"], [0, 1, 2])


@pytest.mark.wide
def test_an_exception_that_leaves_the_block_on_one_rank_is_the_cause_on_the_others(tmp_path: Path, store: Any) -> None:
    job = make_job(tmp_path, store, 3)
    learnt = run(job, [[("a", "commit")], [("a", "raise out")], [("a", "commit")]], [0, 1, 0])
    for rank in (0, 2):
        record = learnt[rank][0]
        assert (record["outcome"], record["blamed"], record["committed"]) == ("RankFailedError", 1, False)
        assert "closed before commit('a') because of RuntimeError: out of the block" in record["message"]


@pytest.mark.wide
def test_every_node_has_a_root_of_its_own(tmp_path: Path, store: Any) -> None:
    job = make_job(tmp_path, store, 4, node_size=2)
    good = [("a", "commit"), ("b", "commit"), ("c", "commit")]
    learnt = run(job, [good, good, good, [("a", "commit"), ("b", "raise"), ("c", "commit")]])
    assert [[record["outcome"] for record in rank] for rank in learnt[:3]] == [
        ["ok", "RankFailedError", "ok", "closed"]
    ] * 3
    for node in (0, 1):
        root = f"{job.root}/node{node}"
        assert_whole(root, ["a", "c"], [2 * node, 2 * node + 1])
        marks = Catalog(root).manifest("a").writer
        assert (marks["shared"], marks["node"], marks["num_nodes"]) == ("False", str(node), "2")
    assert {Catalog(f"{job.root}/node{node}").manifest("c").created_unix_ns for node in (0, 1)} == {
        Catalog(f"{job.root}/node0").manifest("c").created_unix_ns
    }
