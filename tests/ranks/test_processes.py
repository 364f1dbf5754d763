"""Real processes over a TCPStore and a FileStore: one outcome on every rank, whatever one of them does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from async_ckpt import Catalog, load
from tests.ranks.jobs import Job, Plan, Processes, let_go, state_of


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
    "die": (None, "has not reported its part durable within 4 s"),
}


@pytest.mark.wide
@pytest.mark.parametrize("act", FAILURES)
def test_a_failing_rank_fails_the_commit_on_all_and_the_next_one_works(tmp_path: Path, store: Any, act: str) -> None:
    own, cause = FAILURES[act]
    job = make_job(tmp_path, store, 3, timeout_s=4.0 if act == "die" else 30.0)
    bad = [("a", "commit"), ("b", act), ("c", "commit")]
    # A dead rank does not come back.
    good = bad[:1] + [("b", "commit")] + ([] if act == "die" else [("c", "commit")])
    learnt = run(job, [good, good, bad], [0, 0, -9] if act == "die" else None)
    for rank in (0, 1):
        record = learnt[rank][1]
        assert (record["outcome"], record["blamed"], record["committed"]) == ("RankFailedError", 2, False)
        assert cause in record["message"]
        assert "older ones are untouched" in record["message"]
        assert record["s"] < job.timeout_s + 15
    if act == "die":
        assert_whole(job.root, ["a"], [0, 1, 2])
    else:
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
def test_a_hanging_rank_is_named_and_may_join_the_next_checkpoint(tmp_path: Path, store: Any) -> None:
    job = make_job(tmp_path, store, 3, timeout_s=4.0)
    plan = [("a", "commit"), ("b", "commit")]
    processes = Processes(job, [plan, plan, [("a", "hang"), ("b", "commit")]])
    # The survivors have gone on to "b" when they know that "a" has failed.
    while not all(processes.learnt(rank) for rank in (0, 1)):
        processes.ranks[0].join(0.05)
    let_go(job, "a")
    assert processes.join() == [0, 0, 0]
    for rank in (0, 1):
        first, second = processes.learnt(rank)[:2]
        assert (first["outcome"], first["blamed"]) == ("RankFailedError", 2)
        assert second["outcome"] == "ok"
    assert processes.learnt(2)[0]["outcome"] == "RankFailedError"
    assert_whole(job.root, ["b"], [0, 1, 2])


@pytest.mark.wide
def test_ranks_that_disagree_on_the_tag(tmp_path: Path, store: Any) -> None:
    job = make_job(tmp_path, store, 3, timeout_s=60.0)
    plan = [("step-1", "commit"), ("end", "commit")]
    learnt = run(job, [plan, plan, [("step-2", "commit"), ("end", "commit")]])
    for rank in (0, 1):
        assert (learnt[rank][0]["outcome"], learnt[rank][0]["blamed"]) == ("RankFailedError", 2)
        assert "'step-2'" in learnt[rank][0]["message"]
    assert learnt[2][0]["outcome"] == "RankFailedError"
    assert "rank 0 has opened tag 'step-1', not 'step-2'" in learnt[2][0]["message"]
    assert all(rank[0]["s"] < 20 for rank in learnt), "not the whole timeout"
    assert_whole(job.root, ["end"], [0, 1, 2])


@pytest.mark.wide
def test_restart_with_another_number_of_ranks_over_a_store_full_of_stale_keys(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    first = make_job(tmp_path, path, 3, run_id="1", timeout_s=4.0)
    good = [("a", "commit"), ("b", "commit")]
    processes = Processes(first, [[("a", "commit"), ("b", "die")], good, [("a", "commit"), ("b", "die")]])
    assert processes.join() == [-9, 0, -9]
    second = Job(first.root, str(tmp_path / "results2"), 2, path, run_id="2")
    for learnt in run(second, [[("b", "commit"), ("c", "commit")]] * 2):
        assert [record["outcome"] for record in learnt] == ["ok", "ok", "closed"]
    catalog = Catalog(first.root)
    assert catalog.tags() == ["a", "b", "c"]
    assert [len(catalog.manifest(tag).files) for tag in catalog.tags()] == [3, 2, 2]
    assert all(catalog.verify(tag).ok for tag in catalog.tags())


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
