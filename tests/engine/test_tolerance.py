"""`on_commit_failure=Tolerate(...)`: failed commits are warnings until too many of them fail in a row; never quiet."""

from __future__ import annotations

import errno
import itertools
import logging
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import (
    AsyncCheckpointEngine,
    Catalog,
    CommitError,
    ConfigError,
    Mirror,
    OutOfSpaceError,
    PendingCommit,
    PrometheusObserver,
    RankCoordinator,
    RankFailedError,
    TagExistsError,
    Tolerate,
    UnsupportedStateError,
    WriteError,
)
from async_ckpt.engine import pending as pending_module
from async_ckpt.storage.filesystem import FileSystem
from tests.ranks.jobs import FullDisk
from tests.support.faulty_filesystem import FaultyFileSystem
from tests.support.mounts import mounted
from tests.support.processes import run_ranks
from tests.support.stepping import saved

TIMEOUT_S = 60
STATE = {"x": torch.arange(3000.0)}


def make_engine(root: Path, fs: FileSystem | None = None, **options: Any) -> AsyncCheckpointEngine:
    options = {"on_commit_failure": Tolerate(consecutive=2), "reuse": "off", **options}
    return AsyncCheckpointEngine(root, staging_bytes=1 << 20, chunk_bytes=4096, filesystem=fs, **options)


def save(engine: AsyncCheckpointEngine, tag: str) -> PendingCommit:
    engine.create(tag)
    engine.save(STATE, "x.pt")
    engine.save(STATE, "y.pt")
    return engine.commit(tag)


def fails(fs: FaultyFileSystem, name: str = "fsync", code: int = errno.EIO) -> None:
    """Every checkpoint whose tag begins with "bad" fails at that call."""
    fs.fail_when(lambda op: op.name == name and ".bad" in op.path + (op.dst or ""), code)


@pytest.mark.parametrize("name", ["mkdir", "create", "pwrite", "fsync", "rename"])
def test_a_failed_commit_is_a_warning_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    fs = FaultyFileSystem()
    fails(fs, name)
    engine = make_engine(tmp_path, fs)
    save(engine, "one").result(TIMEOUT_S)
    pending = save(engine, "bad1")
    error = pending.exception(TIMEOUT_S)
    assert isinstance(error, (WriteError, CommitError)) and error.errno == errno.EIO
    assert pending.metrics.num_failed_in_a_row == 1
    engine.create("two")
    with pytest.warns(RuntimeWarning, match=r"'bad1' was not committed.*tolerated: 1 failed in a row.*'one'.*stays"):
        engine.save(STATE, "x.pt")
    engine.commit("two").result(TIMEOUT_S)
    engine.close()
    assert [r.levelno for r in caplog.records if "bad1" in r.getMessage()] == [logging.WARNING]
    catalog = Catalog(tmp_path)
    assert catalog.tags() == ["one", "two"] and all(catalog.verify(tag).ok for tag in catalog.tags())


@pytest.mark.parametrize("call", ["create", "commit", "close"])
@pytest.mark.parametrize("asks", [False, True])
def test_the_last_one_in_a_row_is_raised_with_all_of_them(tmp_path: Path, call: str, asks: bool) -> None:
    fs = FaultyFileSystem()
    fails(fs)
    engine = make_engine(tmp_path, fs)
    first = save(engine, "bad1")
    if call == "commit":
        engine.create("open")
    second = saved(engine, STATE, "bad2", path="x.pt")
    for pending in (first, second):
        pending.wait(TIMEOUT_S)
        assert not asks or isinstance(pending.exception(), WriteError)
    calls: dict[str, Any] = {
        "create": lambda: engine.create("c"),
        "commit": lambda: engine.commit("open"),
        "close": engine.close,
    }
    with pytest.raises(CommitError, match=r"2 checkpoints in a row.*older checkpoints stay.*'bad1': .*'bad2'") as told:
        calls[call]()
    assert told.value.errno == errno.EIO and told.value.__cause__ is second.failure()
    # Once; the next one is one too many again, unless one was committed meanwhile.
    if call == "create":
        engine.create("bad3")
        engine.commit("bad3").wait(TIMEOUT_S)
        with pytest.raises(CommitError, match="3 checkpoints in a row"):
            engine.close()
    elif call == "commit":
        calls["commit"]().result(TIMEOUT_S)
        engine.close()


def test_a_success_ends_the_row_and_metrics_count_it(tmp_path: Path) -> None:
    library = pytest.importorskip("prometheus_client")
    registry, seen = library.CollectorRegistry(), []
    fs = FaultyFileSystem()
    fails(fs)
    with make_engine(tmp_path, fs, observers=(PrometheusObserver(registry),)) as engine:
        for tag in ("bad1", "a", "bad2", "b", "bad3"):
            pending = save(engine, tag)
            pending.wait(TIMEOUT_S)
            seen.append(pending.metrics.num_failed_in_a_row)
    assert seen == [1, 0, 1, 0, 1]
    assert registry.get_sample_value("async_ckpt_failed_commits_in_a_row") == 1
    assert registry.get_sample_value("async_ckpt_commit_failures_total") == 3
    assert Catalog(tmp_path).tags() == ["a", "b"]


def test_a_row_that_lasts_too_long_is_raised_before_it_is_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("async_ckpt.engine.pending._now_s", lambda: now_s[0])
    fs = FaultyFileSystem()
    fails(fs)
    with make_engine(tmp_path, fs, on_commit_failure=Tolerate(consecutive=9, within_s=60)) as engine:
        save(engine, "bad1").wait(TIMEOUT_S)
        now_s[0] += 60
        save(engine, "bad2").wait(TIMEOUT_S)
        engine.create("bad3")
        now_s[0] += 1
        engine.commit("bad3").wait(TIMEOUT_S)
        with pytest.raises(CommitError, match="3 checkpoints in a row, within 61 s"):
            engine.create("c")


def test_the_row_is_that_of_the_calls_whatever_ends_first(tmp_path: Path) -> None:
    gate, fs = threading.Event(), FaultyFileSystem()
    fails(fs)
    fs.before = lambda op: (op.name == "fsync" and ".bad1" in op.path and gate.wait(TIMEOUT_S)) and None
    with make_engine(tmp_path, fs) as engine:
        first, second = save(engine, "bad1"), save(engine, "bad2")
        assert not second.done() or first.done()
        gate.set()
        assert second.wait(TIMEOUT_S) and first.done()
        assert [pending.metrics.num_failed_in_a_row for pending in (first, second)] == [1, 2]
        with pytest.raises(CommitError, match="2 checkpoints in a row"):
            engine.create("c")


def test_without_it_the_first_failure_is_raised(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    fails(fs)
    engine = make_engine(tmp_path, fs, on_commit_failure="raise")
    save_one(engine, "bad1").wait(TIMEOUT_S)
    with pytest.raises(WriteError):
        engine.create("a")
    engine.close()


def save_one(engine: AsyncCheckpointEngine, tag: str) -> PendingCommit:
    engine.create(tag)
    engine.save(STATE, "x.pt")
    return engine.commit(tag)


def test_tolerating_one_in_a_row_is_tolerating_none(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    fails(fs)
    with pytest.raises(WriteError), make_engine(tmp_path, fs, on_commit_failure=Tolerate(consecutive=1)) as engine:
        save(engine, "bad1").wait(TIMEOUT_S)


def test_what_no_disk_has_done_is_raised_by_the_call(tmp_path: Path) -> None:
    with make_engine(tmp_path) as engine:
        save(engine, "a").result(TIMEOUT_S)
        with pytest.raises(TagExistsError):
            engine.create("a")
        engine.create("b")
        with pytest.raises(UnsupportedStateError):
            engine.save({"f": lambda: None}, "x.pt")
        engine.abort("b")


def test_one_that_failed_and_was_never_committed_is_named_at_the_end(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    fails(fs, "mkdir")
    engine = make_engine(tmp_path, fs)
    engine.create("bad1")
    engine.save(STATE, "x.pt")
    with pytest.warns(RuntimeWarning, match="'bad1' was created but never committed"):
        engine.close()


@pytest.mark.parametrize(
    "bad", [{"consecutive": 0}, {"consecutive": True}, {"consecutive": 1.5}, {"within_s": 0}, {"within_s": "1h"}]
)
def test_bad_fields_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Tolerate(**bad)


@pytest.mark.parametrize("bad", ["tolerate", None, True, {"consecutive": 2}])
def test_what_is_no_tolerance_is_refused(tmp_path: Path, bad: Any) -> None:
    with pytest.raises(ConfigError, match="on_commit_failure"):
        make_engine(tmp_path, on_commit_failure=bad)


@pytest.mark.wide
def test_a_disk_that_is_full_for_a_while(tmp_path: Path) -> None:
    with mounted("tmpfs", tmp_path, 1 << 20) as root, make_engine(root) as engine:
        save(engine, "a").result(TIMEOUT_S)
        ballast = root / "ballast"
        with open(ballast, "wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        assert isinstance(save(engine, "b").exception(TIMEOUT_S), OutOfSpaceError)
        ballast.unlink()
        save(engine, "c").result(TIMEOUT_S)
        assert engine.tags() == ["a", "c"] and all(engine.load(f"{tag}/y.pt")["x"].equal(STATE["x"]) for tag in "ac")


def _rank(rank: int, root: str, failing: int, name: str, skewed: int | None = None) -> list[Any]:
    fs = FaultyFileSystem()
    if rank == failing:
        fails(fs, name)
    if rank == skewed:
        # Hours from one failure to the next.
        pending_module._now_s = itertools.count(step=7200.0).__next__
    told: list[Any] = []
    engine = make_engine(
        Path(root),
        fs,
        coordinator=RankCoordinator.from_env(timeout_s=20, linger_s=2),
        on_commit_failure=Tolerate(2 if skewed is None else 3),
    )
    for tag in ("bad1", "a", "bad2", "bad3"):
        engine.create(tag)
        engine.save(STATE, f"rank{rank}.pt")
        pending = engine.commit(tag)
        error = pending.exception(TIMEOUT_S)
        told.append((pending.metrics.num_failed_in_a_row, isinstance(error, RankFailedError)))
    try:
        engine.create("b")
        engine.abort("b")
    except CommitError as error:
        told.append(str(error))
    with suppress(CommitError):
        engine.close()
    return told


ATTACKS = [*((0, name) for name in ("mkdir", "create", "pwrite", "fsync", "rename")), (1, "create"), (1, "fsync")]


@pytest.mark.wide
@pytest.mark.parametrize(("failing", "name"), ATTACKS)
def test_all_ranks_count_alike(tmp_path: Path, failing: int, name: str) -> None:
    told = run_ranks(tmp_path / "outcomes", 2, _rank, str(tmp_path / "root"), failing, name)
    for rank, (*commits, raised) in enumerate(told):
        is_others = rank != failing
        assert commits == [(1, is_others), (0, False), (1, is_others), (2, is_others)]
        assert "2 checkpoints in a row" in raised and "'bad2'" in raised and "'bad3'" in raised
    assert Catalog(tmp_path / "root").tags() == ["a"]


@pytest.mark.wide
@pytest.mark.parametrize("skewed", [0, 1])
def test_how_long_a_row_lasts_is_the_same_on_all_ranks(tmp_path: Path, skewed: int) -> None:
    told = run_ranks(tmp_path / "outcomes", 2, _rank, str(tmp_path / "root"), 1, "fsync", skewed)
    assert [[number for number, _ in commits] for commits in told] == [[1, 0, 1, 2]] * 2


def _mirroring_rank(rank: int, root: str, store: str) -> list[Any]:
    mirror = Mirror(f"file://{store}", on_failure="raise")
    coordinator = RankCoordinator.from_env(timeout_s=20, linger_s=2)
    told: list[Any] = []
    fs = FullDisk(".bad") if rank else None
    with make_engine(Path(root), fs, coordinator=coordinator, mirrors=(mirror,)) as engine:
        for tag in ("bad1", "a", "bad2", "b"):
            engine.create(tag)
            engine.save(STATE, f"rank{rank}.pt")
            pending = engine.commit(tag)
            failure = pending.exception(TIMEOUT_S)
            assert pending.mirrored is not None
            assert pending.mirrored.exception(TIMEOUT_S) is failure
            told.append(pending.metrics.num_failed_in_a_row)
    return told


@pytest.mark.wide
def test_what_is_tolerated_is_no_failure_of_a_mirror(tmp_path: Path) -> None:
    root, store = tmp_path / "root", tmp_path / "store"
    told = run_ranks(tmp_path / "outcomes", 2, _mirroring_rank, str(root), str(store))
    assert told == [[1, 0, 1, 0]] * 2
    assert Catalog(root).tags() == Catalog(store).tags() == ["a", "b"]
