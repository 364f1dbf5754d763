"""Ranks that are killed, stopped or leave, as real processes: named at the timeout, and nothing is renamed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from async_ckpt import Catalog
from tests.ranks.jobs import Job, Plan, Processes, let_go
from tests.ranks.test_processes import assert_whole, make_job, run
from tests.support.mounts import mounted
from tests.support.processes import free_port

SHORT_S = 4.0
GRACE_S = 15.0
LONG_S = 50.0
SOON_S = 20.0
GOOD: Plan = [("a", "commit"), ("b", "commit")]


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def address(kind: str, store: Any, tmp_path: Path) -> Any:
    return {"launcher": store, "rank 0": f"zero:{free_port()}", "file": str(tmp_path / "store")}[kind]


def restart(job: Job, tmp_path: Path, store: Any, world_size: int) -> None:
    """Another number of ranks, the same root: what failed is committed now, and nothing is left of it."""
    again = Job(job.root, str(tmp_path / "again"), world_size, f"127.0.0.1:{store.port}", run_id="again")
    for learnt in run(again, [[("b", "commit")]] * world_size):
        assert [record["outcome"] for record in learnt] == ["ok", "closed"]
    assert Catalog(job.root).verify("b").ok
    assert [name for name in os.listdir(job.root) if name.startswith(".")] == []


@pytest.mark.wide
@pytest.mark.parametrize("act", ["die", "die early", "death before report", "leave"])
@pytest.mark.parametrize("kind", ["launcher", "file"])
def test_a_lost_rank_is_named_at_the_timeout(tmp_path: Path, store: Any, act: str, kind: str) -> None:
    job = make_job(tmp_path, address(kind, store, tmp_path), 3, timeout_s=SHORT_S, linger_s=0.5)
    learnt = run(job, [GOOD, GOOD, [("a", "commit"), ("b", act)]], [0, 0, 0 if act == "leave" else -9])
    for rank in (0, 1):
        record = learnt[rank][1]
        assert (record["outcome"], record["blamed"], record["committed"]) == ("RankFailedError", 2, False), record
        assert "not reported its part durable within 4 s" in record["message"]
        assert record["s"] < 2 * SHORT_S + GRACE_S
    assert_whole(job.root, ["a"], [0, 1, 2])
    restart(job, tmp_path, store, 2)


@pytest.mark.wide
def test_several_lost_ranks_are_all_named(tmp_path: Path, store: Any) -> None:
    job = make_job(tmp_path, store, 5, timeout_s=SHORT_S, linger_s=0.5)
    dying: Plan = [("a", "commit"), ("b", "die")]
    learnt = run(job, [GOOD, GOOD, dying, dying, dying], [0, 0, -9, -9, -9])
    for rank in (0, 1):
        assert learnt[rank][1]["blamed"] == 2
        assert "(missing: 2, 3, 4)" in learnt[rank][1]["message"]


@pytest.mark.wide
def test_a_rank_that_is_alive_but_never_creates_is_named_at_the_timeout(tmp_path: Path, store: Any) -> None:
    job = make_job(tmp_path, store, 3, timeout_s=SHORT_S)
    plan: Plan = [*GOOD, ("c", "commit")]
    processes = Processes(job, [plan, plan, [("a", "commit"), ("b", "skip"), ("c", "late")]])
    while not all(len(processes.learnt(rank)) > 1 for rank in (0, 1)):
        processes.ranks[0].join(0.05)
    let_go(job, "c")
    assert processes.join() == [0, 0, 0]
    for rank in (0, 1):
        record = processes.learnt(rank)[1]
        assert (record["outcome"], record["blamed"], record["committed"]) == ("RankFailedError", 2, False)
        assert "not reported its part durable within 4 s" in record["message"]
    assert_whole(job.root, ["a", "c"], [0, 1, 2])


@pytest.mark.wide
def test_a_stopped_rank_fails_the_commit_and_takes_part_again_when_it_goes_on(tmp_path: Path, store: Any) -> None:
    job = make_job(tmp_path, store, 3, timeout_s=SHORT_S)
    processes = Processes(job, [GOOD, GOOD, [("a", "stop"), ("b", "commit")]])
    while not all(processes.learnt(rank) for rank in (0, 1)):
        processes.ranks[0].join(0.05)
    stopped = processes.ranks[2].pid
    assert stopped is not None
    os.kill(stopped, signal.SIGCONT)
    assert processes.join() == [0, 0, 0]
    for rank in (0, 1):
        first, second = processes.learnt(rank)[:2]
        assert (first["outcome"], first["blamed"], first["committed"]) == ("RankFailedError", 2, False)
        assert "not reported its part durable within 4 s" in first["message"]
        assert second["outcome"] == "ok"
    assert [record["outcome"] for record in processes.learnt(2)] == ["RankFailedError", "ok", "closed"]
    assert_whole(job.root, ["b"], [0, 1, 2])


@pytest.mark.wide
@pytest.mark.leaves_staging
@pytest.mark.parametrize("kind", ["launcher", "rank 0"])
@pytest.mark.parametrize("act", ["die", "die early", "death before report", "death in rename", "death after rename"])
def test_rank_zero_is_killed(tmp_path: Path, store: Any, kind: str, act: str) -> None:
    job = make_job(tmp_path, address(kind, store, tmp_path), 3, timeout_s=SHORT_S, linger_s=0.5)
    learnt = run(job, [[("a", "commit"), ("b", act)], GOOD, GOOD], [-9, 0, 0])
    for rank in (1, 2):
        record = learnt[rank][1]
        assert record["s"] < 2 * SHORT_S + GRACE_S, record
        if record["committed"] is None:
            # It had begun to publish, or the store went with it: nobody can know.
            assert record["outcome"] == "CommitError" and "list" in record["message"], record
            assert "rename" in act or kind == "rank 0"
        else:
            assert (record["outcome"], record["committed"]) == ("RankFailedError", False), record
            assert "rename" not in act and record["blamed"] == (0 if kind == "launcher" else None)
    assert_whole(job.root, ["a", "b"] if act == "death after rename" else ["a"], [0, 1, 2])
    if act != "death after rename":
        restart(job, tmp_path, store, 4)


@pytest.mark.wide
@pytest.mark.leaves_staging
def test_rank_zero_is_stopped_with_the_store_in_its_process(tmp_path: Path) -> None:
    job = make_job(tmp_path, f"zero:{free_port()}", 3, timeout_s=4.0, linger_s=0.5)
    processes = Processes(job, [[("a", "commit"), ("b", "stop")], GOOD, GOOD])
    while not all(len(processes.learnt(rank)) == 3 for rank in (1, 2)):
        processes.ranks[1].join(0.05)
    processes.ranks[0].kill()
    assert processes.join() == [-9, 0, 0]
    for rank in (1, 2):
        record = processes.learnt(rank)[1]
        # It may still go on and publish: nobody can know.
        assert record["outcome"] in ("RankFailedError", "CommitError")
        assert "store has not answered for 4 s" in record["message"]
        assert record["s"] < 2 * job.timeout_s + GRACE_S
    assert_whole(job.root, ["a"], [0, 1, 2])


@pytest.mark.wide
def test_a_rank_whose_disk_is_full_for_real(tmp_path: Path, store: Any) -> None:
    with mounted("tmpfs", tmp_path, 1 << 20) as small:
        job = make_job(tmp_path, store, 2, node_size=1, timeout_s=LONG_S, numel=300_000)
        os.makedirs(job.root)
        os.symlink(small, f"{job.root}/node1")
        learnt = run(job, [GOOD, GOOD])
        for record in learnt[0][:2]:
            assert (record["outcome"], record["blamed"], record["committed"]) == ("RankFailedError", 1, False), record
            assert "OutOfSpaceError" in record["message"]
            assert record["s"] < SOON_S
        assert [record["outcome"] for record in learnt[1]] == ["OutOfSpaceError", "OutOfSpaceError", "closed"]
        assert os.listdir(small) == []
        # What was staged was given back, so that a smaller checkpoint fits.
        again = Job(job.root, str(tmp_path / "again"), 2, job.store, run_id="again", node_size=1)
        assert [[record["outcome"] for record in rank] for rank in run(again, [GOOD, GOOD])] == [
            ["ok", "ok", "closed"]
        ] * 2
