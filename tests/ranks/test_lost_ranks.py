"""Ranks that are killed, stopped, late or leave, as real processes: named at the timeout, and nothing is renamed."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from async_ckpt import Catalog
from tests.ranks.jobs import Job, Plan, Processes, Scenario, let_go, ran, side_by_side
from tests.ranks.test_processes import assert_whole, make_job, run
from tests.support.mounts import mounted
from tests.support.processes import free_port

SHORT_S = 8.0
GRACE_S = 15.0
LONG_S = 50.0
SOON_S = 20.0
GOOD: Plan = [("a", "commit"), ("b", "commit")]


@pytest.fixture
def store() -> Any:
    return launched_store()


def launched_store() -> dist.TCPStore:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def short_job(folder: Path, store: Any, world_size: int, kind: str = "launcher") -> Job:
    address = {"launcher": store, "rank 0": f"zero:{free_port()}", "file": str(folder / "store")}[kind]
    return make_job(folder, address, world_size, timeout_s=SHORT_S, linger_s=0.5)


def restarted(job: Job, folder: Path, store: Any, world_size: int) -> Scenario:
    """Another number of ranks, the same root: what failed is committed now, and nothing is left of it."""
    again = Job(job.root, str(folder / "again"), world_size, f"127.0.0.1:{store.port}", run_id="again")
    for learnt in (yield from ran(again, [[("b", "commit")]] * world_size)):
        assert [record["outcome"] for record in learnt] == ["ok", "closed"]
    assert Catalog(job.root).verify("b").ok
    assert [name for name in os.listdir(job.root) if name.startswith(".")] == []


def a_rank_is_lost(folder: Path, act: str, kind: str) -> Scenario:
    """It is named at the timeout."""
    store = launched_store()
    job = short_job(folder, store, 3, kind)
    codes = [0, 0, 0 if act == "leave" else -9]
    learnt = yield from ran(job, [GOOD, GOOD, [("a", "commit"), ("b", act)]], codes)
    for rank in (0, 1):
        record = learnt[rank][1]
        assert (record["outcome"], record["blamed"], record["committed"]) == ("RankFailedError", 2, False), record
        assert f"not reported its part durable within {SHORT_S:g} s" in record["message"]
        assert record["s"] < 2 * SHORT_S + GRACE_S
    assert_whole(job.root, ["a"], [0, 1, 2])
    yield from restarted(job, folder, store, 2)


def several_ranks_are_lost(folder: Path) -> Scenario:
    """All are named."""
    store = launched_store()
    dying: Plan = [("a", "commit"), ("b", "die")]
    learnt = yield from ran(short_job(folder, store, 5), [GOOD, GOOD, dying, dying, dying], [0, 0, -9, -9, -9])
    for rank in (0, 1):
        assert learnt[rank][1]["blamed"] == 2
        assert "(missing: 2, 3, 4)" in learnt[rank][1]["message"]


def a_rank_is_alive_but_never_creates(folder: Path) -> Scenario:
    """It is named at the timeout."""
    store = launched_store()
    job = short_job(folder, store, 3)
    plan: Plan = [*GOOD, ("c", "commit")]
    processes = Processes(job, [plan, plan, [("a", "commit"), ("b", "skip"), ("c", "late")]])
    yield lambda: all(len(processes.learnt(rank)) > 1 for rank in (0, 1))
    let_go(job, "c")
    yield processes.have_ended
    assert processes.join(1.0) == [0, 0, 0]
    for rank in (0, 1):
        record = processes.learnt(rank)[1]
        assert (record["outcome"], record["blamed"], record["committed"]) == ("RankFailedError", 2, False)
        assert f"not reported its part durable within {SHORT_S:g} s" in record["message"]
    assert_whole(job.root, ["a", "c"], [0, 1, 2])


def a_rank_is_stopped(folder: Path) -> Scenario:
    """The commit fails; the rank takes part again when it goes on."""
    store = launched_store()
    job = short_job(folder, store, 3)
    processes = Processes(job, [GOOD, GOOD, [("a", "stop"), ("b", "commit")]])
    yield lambda: all(processes.learnt(rank) for rank in (0, 1))
    stopped = processes.ranks[2].pid
    assert stopped is not None
    os.kill(stopped, signal.SIGCONT)
    yield processes.have_ended
    assert processes.join(1.0) == [0, 0, 0]
    for rank in (0, 1):
        first, second = processes.learnt(rank)[:2]
        assert (first["outcome"], first["blamed"], first["committed"]) == ("RankFailedError", 2, False)
        assert f"not reported its part durable within {SHORT_S:g} s" in first["message"]
        assert second["outcome"] == "ok"
    assert [record["outcome"] for record in processes.learnt(2)] == ["RankFailedError", "ok", "closed"]
    assert_whole(job.root, ["b"], [0, 1, 2])


def rank_zero_is_killed(folder: Path, act: str, kind: str) -> Scenario:
    """The others learn what they can know."""
    store = launched_store()
    job = short_job(folder, store, 3, kind)
    learnt = yield from ran(job, [[("a", "commit"), ("b", act)], GOOD, GOOD], [-9, 0, 0])
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
        yield from restarted(job, folder, store, 4)


def rank_zero_is_stopped_with_the_store(folder: Path) -> Scenario:
    """It may still go on and publish: nobody can know."""
    job = short_job(folder, None, 3, "rank 0")
    processes = Processes(job, [[("a", "commit"), ("b", "stop")], GOOD, GOOD])
    yield lambda: all(len(processes.learnt(rank)) == 3 for rank in (1, 2))
    processes.ranks[0].kill()
    yield processes.have_ended
    assert processes.join(1.0) == [-9, 0, 0]
    for rank in (1, 2):
        record = processes.learnt(rank)[1]
        assert record["outcome"] in ("RankFailedError", "CommitError")
        assert f"store has not answered for {SHORT_S:g} s" in record["message"]
        assert record["s"] < 2 * job.timeout_s + GRACE_S
    assert_whole(job.root, ["a"], [0, 1, 2])


def a_rank_hangs(folder: Path) -> Scenario:
    """It is named, and may join the next checkpoint."""
    store = launched_store()
    job = short_job(folder, store, 3)
    processes = Processes(job, [GOOD, GOOD, [("a", "hang"), ("b", "commit")]])
    # The survivors have gone on to "b" when they know that "a" has failed.
    yield lambda: all(processes.learnt(rank) for rank in (0, 1))
    let_go(job, "a")
    yield processes.have_ended
    assert processes.join(1.0) == [0, 0, 0]
    for rank in (0, 1):
        first, second = processes.learnt(rank)[:2]
        assert (first["outcome"], first["blamed"]) == ("RankFailedError", 2)
        assert second["outcome"] == "ok"
    assert processes.learnt(2)[0]["outcome"] == "RankFailedError"
    assert_whole(job.root, ["b"], [0, 1, 2])


def ranks_disagree_on_the_tag(folder: Path) -> Scenario:
    """Both sides are told, long before the timeout."""
    store = launched_store()
    job = make_job(folder, store, 3, timeout_s=60.0)
    plan: Plan = [("step-1", "commit"), ("end", "commit")]
    learnt = yield from ran(job, [plan, plan, [("step-2", "commit"), ("end", "commit")]])
    for rank in (0, 1):
        assert (learnt[rank][0]["outcome"], learnt[rank][0]["blamed"]) == ("RankFailedError", 2)
        assert "'step-2'" in learnt[rank][0]["message"]
    assert learnt[2][0]["outcome"] == "RankFailedError"
    assert "rank 0 has opened tag 'step-1', not 'step-2'" in learnt[2][0]["message"]
    assert all(rank[0]["s"] < 40 for rank in learnt), "not the whole timeout"
    assert_whole(job.root, ["end"], [0, 1, 2])


def restart_over_a_store_full_of_stale_keys(folder: Path) -> Scenario:
    """With another number of ranks."""
    path = str(folder / "store")
    first = make_job(folder, path, 3, run_id="1", timeout_s=SHORT_S, linger_s=0.5)
    yield from ran(first, [[("a", "commit"), ("b", "die")], GOOD, [("a", "commit"), ("b", "die")]], [-9, 0, -9])
    second = Job(first.root, str(folder / "results2"), 2, path, run_id="2")
    for learnt in (yield from ran(second, [[("b", "commit"), ("c", "commit")]] * 2)):
        assert [record["outcome"] for record in learnt] == ["ok", "ok", "closed"]
    catalog = Catalog(first.root)
    assert catalog.tags() == ["a", "b", "c"]
    assert [len(catalog.manifest(tag).files) for tag in catalog.tags()] == [3, 2, 2]
    assert all(catalog.verify(tag).ok for tag in catalog.tags())


_LOST = itertools.product(("die", "die early", "death before report", "leave"), ("launcher", "file"))
_KILLED = itertools.product(
    ("die", "die early", "death before report", "death in rename", "death after rename"), ("launcher", "rank 0")
)
SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    **{f"a rank is lost: {act}, {kind}": partial(a_rank_is_lost, act=act, kind=kind) for act, kind in _LOST},
    "several ranks are lost": several_ranks_are_lost,
    "a rank is alive but never creates": a_rank_is_alive_but_never_creates,
    "a rank is stopped": a_rank_is_stopped,
    **{
        f"rank zero is killed: {act}, {kind}": partial(rank_zero_is_killed, act=act, kind=kind) for act, kind in _KILLED
    },
    "a rank hangs": a_rank_hangs,
    "ranks disagree on the tag": ranks_disagree_on_the_tag,
    "restart over a store full of stale keys": restart_over_a_store_full_of_stale_keys,
    "rank zero is stopped with the store": rank_zero_is_stopped_with_the_store,
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseException | None]:
    """They wait for timeouts nearly all the time, so they run side by side."""
    return side_by_side({name: begin(tmp_path_factory.mktemp("job")) for name, begin in SCENARIOS.items()}, 11)


@pytest.mark.wide
@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_ranks_are_lost(ended: dict[str, BaseException | None], scenario: str) -> None:
    if (error := ended[scenario]) is not None:
        raise error


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
