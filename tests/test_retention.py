"""Retention: decisions with reasons, and deletions that never reach the newest good checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from async_ckpt import retention
from async_ckpt.engine.config import EngineConfig
from async_ckpt.engine.housekeeping import Housekeeping
from async_ckpt.engine.pipeline import Callbacks
from async_ckpt.errors import ConfigError, WriteError
from async_ckpt.ranks.coordinator import LocalCoordinator
from async_ckpt.reading.catalog import Catalog
from async_ckpt.retention import (
    AnyOf,
    CheckpointInfo,
    KeepBest,
    KeepEvery,
    KeepLast,
    KeepNewerThan,
    RetentionPolicy,
    decide,
)
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from tests.support.faulty_filesystem import FaultyFileSystem

from .support.making import OLD, commit, content

SECOND_NS = 10**9
RUN = [
    CheckpointInfo(f"step-{n * 100}", n * SECOND_NS, {"step": n * 100, "loss": abs(n - 4) + 1.0}) for n in range(1, 9)
]


def kept(policy: RetentionPolicy, run: list[CheckpointInfo] = RUN) -> list[int]:
    return [
        int(decision.tag.split("-")[1]) // 100
        for decision in decide(run, policy, now_unix_ns=9 * SECOND_NS)
        if decision.keep
    ]


@pytest.mark.wide
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (KeepLast(3), [6, 7, 8]),
        (KeepLast(99), [1, 2, 3, 4, 5, 6, 7, 8]),
        (KeepEvery(400), [4, 8]),
        (KeepBest("loss"), [4, 8]),
        (KeepBest("loss", 3), [3, 4, 5, 8]),
        (KeepBest("loss", 1, "max"), [8]),
        (KeepBest("loss", 2, "max"), [7, 8]),
        (KeepNewerThan(3.5), [6, 7, 8]),
        (KeepLast(1) | KeepEvery(300) | KeepBest("loss"), [3, 4, 6, 8]),
        (AnyOf(KeepLast(2), KeepEvery(1000)), [7, 8]),
        (AnyOf(), [8]),
    ],
)
def test_policies(policy: RetentionPolicy, expected: list[int]) -> None:
    assert kept(policy) == expected
    assert kept(policy, RUN[::-1]) == expected


def test_reasons_are_given() -> None:
    decisions = {decision.tag: decision for decision in decide(RUN, KeepLast(1) | KeepBest("loss") | KeepEvery(400))}
    assert decisions["step-400"].reasons == ("among the best 1 by loss (min); step 400 is a multiple of 400",)
    assert decisions["step-800"].reasons[-1] == "the newest is always kept"
    assert "not kept by KeepLast(num=1)" in decisions["step-100"].reasons[0]


def test_ties_go_to_the_newer() -> None:
    run = [CheckpointInfo(tag, n, {"acc": 1}) for n, tag in enumerate("abcd")]
    assert [d.tag for d in decide(run, KeepBest("acc", 2)) if d.keep] == ["c", "d"]


def test_steps_come_from_metadata_or_the_tag() -> None:
    assert CheckpointInfo("x-7", 1, {"step": 3}).step == 3
    assert CheckpointInfo("x-007", 1).step == 7
    assert CheckpointInfo("x", 1, {"step": True}).step is None
    run = [CheckpointInfo("final", 1), CheckpointInfo("s-1", 2), CheckpointInfo("s-2", 3)]
    assert [d.tag for d in decide(run, KeepEvery(10)) if d.keep] == ["final", "s-2"]


def test_an_unknown_metric_is_an_error_that_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"'acc'.*loss, step.*engine\.commit"):
        decide(RUN, KeepBest("acc"))
    with pytest.raises(ConfigError, match="'low', not a number"):
        decide([CheckpointInfo("a", 1, {"loss": "low"})], KeepBest("loss"))
    assert decide([], KeepBest("acc")) == []
    huge = [CheckpointInfo("a", 1, {"loss": 10**400}), CheckpointInfo("b", 2, {"loss": 0.5}), CheckpointInfo("c", 3)]
    assert [d.tag for d in decide(huge, KeepBest("loss")) if d.keep] == ["b", "c"]
    some = [*RUN, CheckpointInfo("other", 10**12)]
    assert [d.tag for d in decide(some, KeepBest("loss")) if d.keep] == ["step-400", "other"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepLast(0),
        lambda: KeepLast(True),
        lambda: KeepLast(1.5),
        lambda: KeepEvery(-1),
        lambda: KeepBest(""),
        lambda: KeepBest("x", 0),
        lambda: KeepBest("x", mode="best"),
        lambda: KeepNewerThan(0),
        lambda: KeepNewerThan(float("nan")),
        lambda: AnyOf(3),
    ],
)
def test_bad_policies_are_refused_when_made(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]
    with pytest.raises(TypeError):
        KeepLast(1) | 3


@given(
    st.lists(st.tuples(st.integers(0, 100), st.floats(-10, 10)), max_size=20),
    st.integers(1, 5),
    st.integers(1, 50),
)
def test_the_newest_is_always_kept_and_union_is_union(rows: list[tuple[int, float]], num: int, every: int) -> None:
    run = [CheckpointInfo(f"t{n}-{step}", step, {"loss": loss}) for n, (step, loss) in enumerate(rows)]
    policies = [KeepLast(num), KeepEvery(every), KeepBest("loss", num)]
    sets = []
    for policy in [*policies, policies[0] | policies[1] | policies[2]]:
        decisions = decide(run, policy)
        assert len(decisions) == len(run)
        assert not run or decisions[-1].keep
        assert all(decision.reasons for decision in decisions)
        sets.append({decision.tag for decision in decisions if decision.keep})
    assert sets[3] == sets[0] | sets[1] | sets[2]


def test_applied_to_a_directory(fast_path: Path) -> None:
    for number in range(1, 6):
        commit(fast_path, f"s{number}", OLD, created=number)
    retention.apply(FileSystem(), str(fast_path), KeepLast(2))
    assert Catalog(fast_path).tags() == ["s4", "s5"]
    assert content(fast_path, "s4") == OLD


def test_nothing_is_deleted_while_the_newest_is_damaged(fast_path: Path) -> None:
    for number in range(1, 4):
        commit(fast_path, f"s{number}", OLD, created=number)
    (fast_path / "s3" / "model.bin").unlink()
    decisions = retention.apply(FileSystem(), str(fast_path), KeepLast(1))
    assert all(decision.keep for decision in decisions)
    assert "damaged" in decisions[0].reasons[0]
    assert len(Catalog(fast_path).tags()) == 3


@contextlib.contextmanager
def keeping(fs: FileSystem, root: Path, policy: RetentionPolicy) -> Iterator[Housekeeping]:
    """An engine's retention, without an engine. What it logs is there afterwards."""
    callbacks = Callbacks((), "callbacks")
    yield Housekeeping(EngineConfig(root=root, retention=policy), fs, Catalog(root, fs), LocalCoordinator(), callbacks)
    callbacks.close(60)


def test_failures_and_races_of_deletion(fast_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(1, 5):
        commit(fast_path, f"s{number}", OLD, created=number)
    fs = FaultyFileSystem()

    def race(op: object) -> None:
        if op.name == "flock" and "/s1/" in op.path and (fast_path / "s1").exists():  # type: ignore[attr-defined]
            transaction.remove(FileSystem(), str(fast_path), "s1")

    fs.before = race
    fs.fail_when(lambda op: op.name == "rename" and op.path.endswith("s2"), 5)
    decisions = {decision.tag: decision for decision in retention.apply(fs, str(fast_path), KeepLast(1))}
    assert Catalog(fast_path).tags() == ["s2", "s4"], "one that cannot be deleted does not keep the others"
    assert isinstance(decisions["s2"].failure, WriteError)
    assert decisions["s2"].keep
    with keeping(fs, fast_path, KeepLast(1)) as house:
        assert [house.rotate(), house.rotate()] == [1, 1]
        fs.heal()
        assert house.rotate() == 0
    assert len(caplog.records) == 1
    assert Catalog(fast_path).tags() == ["s4"]


def test_a_root_that_cannot_be_looked_at_is_told_and_a_policy_that_raises_is_an_error(fast_path: Path) -> None:
    class Broken(RetentionPolicy):
        def kept(self, checkpoints: object, now_unix_ns: int) -> dict[str, str]:
            raise KeyError("loss")

    commit(fast_path, "a", OLD)
    fs = FaultyFileSystem()
    fs.fail_when(lambda op: op.name == "open" and op.path.endswith("a/manifest.json"), 24)
    with keeping(fs, fast_path, KeepLast(1)) as house:
        assert house.rotate() == 1
    with keeping(FileSystem(), fast_path, Broken()) as house:
        assert house.rotate() == 0
    with pytest.raises(ConfigError, match="KeyError"):
        raise house.failures.pop()


def test_one_commit_dated_in_the_future_does_not_keep_all() -> None:
    """Its successors are ordered after it, so their order says nothing about their age; their writers' clocks do."""
    ahead = 1_000_000
    seconds = {
        "old": (1, 1),
        "ahead": (ahead, ahead),
        "b": (ahead + 1, 20),
        "c": (ahead + 11, 30),
        "d": (ahead + 16, 35),
    }
    run = [CheckpointInfo(tag, made * SECOND_NS, {}, clock * SECOND_NS) for tag, (made, clock) in seconds.items()]
    decisions = decide(run, KeepNewerThan(8), now_unix_ns=36 * SECOND_NS)
    assert [decision.tag for decision in decisions if decision.keep] == ["c", "d"]
    # The newest is dated in the future: it was made before now, and before nothing else.
    assert [d.tag for d in decide(run[:2], KeepNewerThan(8), now_unix_ns=5 * SECOND_NS) if d.keep] == ["old", "ahead"]
    assert [d.tag for d in decide(run[:2], KeepNewerThan(8), now_unix_ns=36 * SECOND_NS) if d.keep] == ["ahead"]


def test_null_is_never_the_best_and_never_an_error() -> None:
    run = [CheckpointInfo("a", 1, {"loss": None}), CheckpointInfo("b", 2, {"loss": None})]
    assert [d.tag for d in decide(run, KeepBest("loss")) if d.keep] == ["b"]
    run.append(CheckpointInfo("c", 3, {"loss": float("inf")}))
    run.append(CheckpointInfo("d", 4, {"loss": 5}))
    run.append(CheckpointInfo("e", 5, {}))
    assert [d.tag for d in decide(run, KeepBest("loss", 2)) if d.keep] == ["d", "e"]
    assert [d.tag for d in decide(run, KeepBest("loss", 2, "max")) if d.keep] == ["d", "e"]


def test_not_a_number_is_never_the_best() -> None:
    losses = [3.0, float("nan"), 1.0, None, 2.0]
    run = [CheckpointInfo(f"s{n}", n, {} if loss is None else {"loss": loss}) for n, loss in enumerate(losses, 1)]
    run.append(CheckpointInfo("newest", 9, {"loss": 9.0}))
    assert [d.tag for d in decide(run, KeepBest("loss", 2)) if d.keep] == ["s3", "s5", "newest"]
    assert [d.tag for d in decide(run, KeepBest("loss", 2, "max")) if d.keep] == ["s1", "newest"]


def test_a_clock_that_was_set_back_keeps_what_seems_to_come_from_the_future() -> None:
    run = [CheckpointInfo("a", 10 * SECOND_NS), CheckpointInfo("b", 20 * SECOND_NS)]
    assert all(decision.keep for decision in decide(run, KeepNewerThan(3), now_unix_ns=5 * SECOND_NS))
