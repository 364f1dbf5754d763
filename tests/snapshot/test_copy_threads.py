"""Eager copies shared between the caller and helper threads: the right bytes, and no chunk handed out while one still
writes to it.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.snapshot import copy_threads as team_module
from async_ckpt.snapshot.arena import StagingArena
from async_ckpt.snapshot.copy_threads import CopyTeam
from tests.support.insides import commits_of
from tests.support.stepping import Doing, Gate

TIMEOUT_S = 60.0


def on_thread(fn: Any) -> Future[None]:
    done: Future[None] = Future()
    threading.Thread(target=lambda: done.set_result(fn()), daemon=True).start()
    return done


def team_of(submit: Any, native_ids: list[int]) -> CopyTeam:
    return CopyTeam(SimpleNamespace(submit=submit, native_ids=native_ids))


@pytest.fixture
def gate() -> Any:
    """Stands before every job of a helper."""
    made = Gate()
    made.close()
    yield made
    made.open()


@pytest.mark.wide
def test_each_job_runs_once_and_ends_are_told_in_order() -> None:
    ran: list[int] = []
    told: list[int] = []
    team_of(on_thread, [-1] * 3).run(200, ran.append, ran.append, told.append)
    assert sorted(ran) == told == list(range(200))


def test_an_end_is_told_only_after_all_before_it(gate: Gate) -> None:
    """The helper holds one job: those behind it are done, and wait."""
    told: list[int] = []
    helped: list[int] = []
    taken = threading.Event()

    def work(k: int) -> None:
        taken.wait(TIMEOUT_S)

    def help_with(k: int) -> None:
        taken.set()
        gate.reach()
        helped.append(k)
        assert all(before < k for before in told)

    doing = Doing(lambda: team_of(on_thread, [-1]).run(50, work, help_with, told.append))
    gate.let_one_pass()
    gate.open()
    doing.result()
    assert told == list(range(50)) and helped


def test_what_a_helper_raises_is_raised_to_the_caller() -> None:
    begun: list[int] = []

    def break_down(k: int) -> None:
        raise OSError(5, "no memory behind this address")

    def work(k: int) -> None:
        begun.append(k)
        failed.wait(TIMEOUT_S)

    failed = threading.Event()

    def helping(fn: Any) -> Future[None]:
        done = on_thread(fn)
        done.add_done_callback(lambda _: failed.set())
        return done

    with pytest.raises(OSError, match="no memory behind"):
        team_of(helping, [-1]).run(50, work, break_down, lambda k: None)
    assert len(begun) <= 1


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_helpers_keep_off_the_callers_core() -> None:
    allowed = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    def look(k: int) -> None:
        seen.append(os.sched_getaffinity(0))
        looked.set()

    looked = threading.Event()
    with ThreadPoolExecutor(1) as helper:
        native_id = helper.submit(threading.get_native_id).result(TIMEOUT_S)
        team = team_of(helper.submit, [native_id])
        for callers in (min(allowed), max(allowed)):
            looked.clear()
            os.sched_setaffinity(0, {callers})
            try:
                team.run(2, lambda k: looked.wait(TIMEOUT_S) and None, look, lambda k: None)
            finally:
                os.sched_setaffinity(0, allowed)
            assert seen.pop() == allowed - {callers}
        os.sched_setaffinity(native_id, {callers})
        looked.clear()
        team.run(2, lambda k: looked.wait(TIMEOUT_S) and None, look, lambda k: None)
        assert seen.pop() == {callers}, "the user's own choice"


def test_after_an_interrupt_no_job_begins(gate: Gate) -> None:
    helped: list[int] = []

    def help_with(k: int) -> None:
        gate.reach()
        helped.append(k)

    def interrupt(k: int) -> None:
        # Not before the helper has one.
        while not gate.num_reached:
            threading.Event().wait(0.0002)
        raise KeyboardInterrupt

    ends: list[Future[None]] = []

    def helping(fn: Any) -> Future[None]:
        ends.append(on_thread(fn))
        return ends[-1]

    with pytest.raises(KeyboardInterrupt):
        team_of(helping, [-1]).run(50, interrupt, help_with, lambda k: None)
    gate.open()
    ends[0].result(TIMEOUT_S)
    assert len(helped) == 1


def test_a_chunk_that_is_given_up_comes_back_after_its_last_user() -> None:
    arena = StagingArena(1, 4096)
    [chunk] = arena.try_reserve(1) or []
    with arena.using(chunk) as is_held:
        assert is_held
        arena.release(chunk)
        assert arena.try_reserve(1) is None
        with arena.using(chunk) as is_held:
            assert not is_held, "nobody may begin on a chunk that was given up"
        assert arena.try_reserve(1) is None
    [again] = arena.try_reserve(1) or []
    with arena.using(chunk) as is_held:
        assert not is_held, "the same memory, somebody else's now"
    arena.release(again)
    assert arena.num_free == 1
    arena.close()


@pytest.mark.wide
@pytest.mark.parametrize(
    ("num_cores", "num_ranks", "num_helpers"), [(1, 1, 0), (2, 1, 1), (2, 2, 0), (2, 4, 0), (64, 1, 7), (64, 16, 3)]
)
def test_an_eager_save_with_helpers_has_the_right_bytes(
    tmp_path: Path, num_cores: int, num_ranks: int, num_helpers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With cores to spare chunks go to the writer as they are copied, otherwise most of them afterwards."""
    monkeypatch.setattr(team_module, "num_cores", lambda: num_cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_ranks))
    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=64 << 20, chunk_bytes=1 << 20)
    state = {f"w{k}": torch.randint(0, 255, (3_000_000 + 17 * k,), dtype=torch.uint8) for k in range(9)}
    wanted = {name: tensor.clone() for name, tensor in state.items()}
    with engine:
        assert len(commits_of(engine).pool.helpers.native_ids) == num_helpers
        for step in range(3):
            engine.create(f"step-{step}")
            engine.save(state, "s.pt")
            for tensor in state.values():
                tensor.add_(1)
            engine.commit(f"step-{step}").result(TIMEOUT_S)
    for step in range(3):
        loaded = torch.load(tmp_path / f"step-{step}" / "s.pt")
        assert all(torch.equal(loaded[name], wanted[name] + step) for name in wanted)
