"""Resuming with a root per node: real processes agree on the newest checkpoint that every node has."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from async_ckpt import AsyncCheckpointEngine, Catalog, Mirror, RankFailedError
from async_ckpt.ranks.exchange import Exchange
from async_ckpt.ranks.rank_coordinator import RankCoordinator
from tests.ranks.jobs import Job, start_together
from tests.ranks.test_processes import make_job, run
from tests.support.processes import context

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def ask(job: Job, rank: int, verify: str, num_ranks: int, num_times: int) -> None:
    coordinator = job.coordinator(rank)
    root = f"{job.root}/node{rank // job.node_size}" if job.node_size else job.root
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20, coordinator=coordinator):
        start_together(job, num_ranks)
        answers = []
        for _ in range(num_times):
            try:
                answers.append(coordinator.latest_on_all(verify))
            except RankFailedError as error:
                answers.append(f"RankFailedError: {error}")
    Path(job.results, f"answer{rank}").write_text(json.dumps(answers))


def answers_of(job: Job, verify: str = "full", without: int = -1) -> list[Any]:
    ranks = [rank for rank in range(job.world_size) if rank != without]
    found = run_each(job, ask, verify, len(ranks), 1 if without >= 0 else 2, ranks=ranks)
    assert all(len(set(answers)) == 1 for answers in found)
    return [answers[0] for answers in found]


def run_each(job: Job, work: Callable[..., None], *args: Any, ranks: Sequence[int] | None = None) -> list[Any]:
    """What `work(job, rank, *args)` has written as its answer, in a process for each rank."""
    shutil.rmtree(job.results, ignore_errors=True)
    os.makedirs(job.results)
    ranks = range(job.world_size) if ranks is None else ranks
    processes = [context.Process(target=work, args=(job, rank, *args)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [json.loads(Path(job.results, f"answer{rank}").read_text()) for rank in ranks]


@pytest.mark.wide
def test_the_newest_checkpoint_that_all_nodes_have_whole(tmp_path: Path, store: Any) -> None:
    job = make_job(tmp_path, store, 4, node_size=2)
    run(job, [[(tag, "commit") for tag in "abcd"]] * 4)
    again = make_job(tmp_path, store, 4, node_size=2, run_id="2", timeout_s=30.0)
    assert answers_of(again) == ["d"] * 4
    # A crash between the nodes' renames: only one has the newest.
    shutil.rmtree(f"{job.root}/node1/d")
    assert answers_of(make_job(tmp_path, store, 4, node_size=2, run_id="3", timeout_s=30.0)) == ["c"] * 4
    # Damage on another node is seen only there.
    damaged = Path(job.root, "node0", "c", "rank1.pt")
    data = bytearray(damaged.read_bytes())
    data[-100] ^= 1
    damaged.write_bytes(data)
    assert answers_of(make_job(tmp_path, store, 4, node_size=2, run_id="4", timeout_s=30.0)) == ["b"] * 4
    assert answers_of(make_job(tmp_path, store, 4, node_size=2, run_id="5", timeout_s=30.0), "size") == ["c"] * 4
    # The same tag of another commit is another checkpoint.
    shutil.rmtree(f"{job.root}/node1/b")
    os.rename(f"{job.root}/node1/a", f"{job.root}/node1/b")
    assert answers_of(make_job(tmp_path, store, 4, node_size=2, run_id="6", timeout_s=30.0)) == [None] * 4
    # What is left are counters, not questions.
    assert store.num_keys() <= 1 + 6 * (3 + 2 * 4)


def restore(job: Job, rank: int) -> None:
    with job.engine(rank, "") as engine:
        start_together(job, job.world_size)
        tag = engine.latest(tier="any")
        answer = [tag, engine.tags(), tag and engine.load(f"{tag}/rank{rank}.pt")["rank"]]
    Path(job.results, f"answer{rank}").write_text(json.dumps(answer))


@pytest.mark.wide
def test_a_node_that_lost_its_disk_resumes_from_its_mirror_where_all_nodes_can(tmp_path: Path, store: Any) -> None:
    mirrored = {"mirrors": (Mirror(f"file://{tmp_path}/mirror"),)}
    job = make_job(tmp_path, store, 2, node_size=1, extra=mirrored)
    run(job, [[(tag, "commit") for tag in "abc"]] * 2)
    shutil.rmtree(f"{job.root}/node1")
    again = make_job(tmp_path, store, 2, node_size=1, extra=mirrored, run_id="2")
    assert run_each(again, restore) == [["c", ["a", "b", "c"], 0], ["c", [], 1]]
    # What the lost node has not mirrored is not what all have, though it is the newest of the other one's disk.
    shutil.rmtree(tmp_path / "mirror" / "node-1" / "c")
    again = make_job(tmp_path, store, 2, node_size=1, extra=mirrored, run_id="3")
    assert run_each(again, restore) == [["b", ["a", "b", "c"], 0], ["b", [], 1]]


@pytest.mark.wide
def test_with_one_shared_root_rank_zero_reads(tmp_path: Path, store: Any) -> None:
    job = make_job(tmp_path, store, 3)
    assert answers_of(make_job(tmp_path, store, 3, run_id="0", timeout_s=30.0)) == [None] * 3
    run(job, [[("a", "commit"), ("b", "commit")]] * 3)
    assert answers_of(make_job(tmp_path, store, 3, run_id="2", timeout_s=30.0)) == ["b"] * 3


@pytest.mark.wide
def test_a_node_that_does_not_answer_is_named_on_all(tmp_path: Path, store: Any) -> None:
    job = make_job(tmp_path, store, 3, node_size=1, timeout_s=5.0)
    for answer in answers_of(job, without=2):
        assert "rank 2 has not answered within 5 s" in answer


def test_a_root_that_cannot_be_read_is_an_error_on_all(tmp_path: Path) -> None:
    store = dist.HashStore()

    def work(rank: int) -> str:
        from async_ckpt.ranks.rank_coordinator import Node

        coordinator = RankCoordinator(store, rank, 2, timeout_s=30.0, linger_s=1.0, node=Node(rank, 2, (rank,)))
        with AsyncCheckpointEngine(tmp_path / str(rank), staging_bytes=1 << 20, coordinator=coordinator):
            if rank == 1:
                os.rmdir(tmp_path / "1")
            with pytest.raises(RankFailedError) as caught:
                coordinator.latest_on_all()
            os.makedirs(tmp_path / "1", exist_ok=True)
            return str(caught.value)

    with ThreadPoolExecutor(2) as ranks:
        assert all("node 1 could not read" in message for message in ranks.map(work, range(2)))
    assert Catalog(tmp_path / "0").tags() == []


@pytest.mark.wide
def test_a_rank_that_gave_up_in_the_middle_is_in_step_at_the_next_question(tmp_path: Path) -> None:
    store = dist.HashStore()

    def work(rank: int) -> list[int]:
        coordinator = RankCoordinator(store, rank, 2, timeout_s=30.0, linger_s=1.0)
        with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, coordinator=coordinator):
            exchange = Exchange(coordinator.talk, "question", 2.0)
            exchange.begin()
            exchange.round(rank, list)
            if rank == 0:
                # Rank 1 has given up; it asks the next question.
                with pytest.raises(RankFailedError, match="rank 1 has not answered"):
                    exchange.round(rank, list)
            exchange.begin()
            exchange.round(rank, list)
            return list(exchange.round(rank + 10, list))

    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(work, range(2))) == [[10, 11]] * 2
