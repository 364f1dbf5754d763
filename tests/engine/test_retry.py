"""A retry in the same process while the engine before is still referenced; paths that exclude each other."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import (
    AsyncCheckpointEngine,
    BackpressureTimeout,
    Catalog,
    ConfigError,
    PathExistsError,
    RankCoordinator,
    TransactionStateError,
)
from tests.support.faulty_filesystem import FaultyFileSystem

TIMEOUT_S = 60


def save(engine: AsyncCheckpointEngine, tag: str) -> Any:
    engine.create(tag)
    engine.save({"x": torch.full((10,), float(len(tag)))}, "x.pt")
    return engine.commit(tag)


class Held:
    """An engine whose commit of "newer" waits for `gate`, beside a committed "old"."""

    def __init__(self, root: Path) -> None:
        self.gate = threading.Event()
        reached = threading.Event()
        self.fs = FaultyFileSystem()

        def hold(op: Any) -> None:
            if op.name == "fsync" and ".newer." in op.path:
                reached.set()
                self.gate.wait(TIMEOUT_S)

        self.fs.before = hold
        self.engine = AsyncCheckpointEngine(root, staging_bytes=1 << 20, filesystem=self.fs)
        save(self.engine, "old").result(TIMEOUT_S)
        self.pending = save(self.engine, "newer")
        assert reached.wait(TIMEOUT_S)


@pytest.mark.wide
def test_a_second_engine_waits_for_what_the_first_has_pending(tmp_path: Path) -> None:
    held = Held(tmp_path / "root")
    (tmp_path / "link").symlink_to("root")
    with held.engine, AsyncCheckpointEngine(tmp_path / "link", staging_bytes=1 << 20) as retry:
        with pytest.raises(TransactionStateError, match="pending"):
            retry.create("newer")
        threading.Timer(0.2, held.gate.set).start()
        assert retry.latest() == "newer"
        assert retry.load("newer/x.pt")["x"][0] == 5


@pytest.mark.parametrize("ask", ["catalog", "latest_on_all"])
def test_who_resumes_without_an_engine_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture, ask: str) -> None:
    held = Held(tmp_path / "root")
    (tmp_path / "link").symlink_to("root")
    with held.engine, caplog.at_level(logging.WARNING, logger="async_ckpt"):
        latest = Catalog(tmp_path / "link").latest
        if ask == "latest_on_all":
            coordinator = RankCoordinator(torch.distributed.HashStore(), 0, 1)
            coordinator.bind(held.fs, str(tmp_path / "link"))
            latest = coordinator.latest_on_all
        assert latest() == latest() == "old"
        if ask == "latest_on_all":
            coordinator.close()
        assert caplog.text.count("'newer'") == 1
        held.gate.set()
        held.pending.result(TIMEOUT_S)
        assert Catalog(tmp_path / "link").latest() == "newer"


@pytest.mark.wide
def test_a_rank_waits_for_what_its_engine_before_has_pending(tmp_path: Path) -> None:
    """Two ranks, as threads of this process: the neighbour's commits are not waited for."""
    gate, reached = threading.Event(), threading.Event()
    fs = FaultyFileSystem()

    def hold(op: Any) -> None:
        if op.name == "fsync" and op.path == str(tmp_path):
            reached.set()
            gate.wait(TIMEOUT_S)

    store = torch.distributed.HashStore()

    def engines(run_id: str) -> list[AsyncCheckpointEngine]:
        ranks = [RankCoordinator(store, rank, 2, run_id=run_id, timeout_s=60) for rank in range(2)]
        return [
            AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, filesystem=fs, coordinator=rank) for rank in ranks
        ]

    first = engines("first")
    fs.before = hold
    for rank, engine in enumerate(first):
        engine.create("t")
        engine.save({"x": torch.ones(10)}, f"{rank}.pt")
    pending = [engine.commit("t") for engine in first]
    assert reached.wait(TIMEOUT_S)
    second = engines("second")
    threading.Timer(0.3, gate.set).start()
    assert second[1].latest() == "t" == second[0].latest()
    for engine in (*first, *second):
        engine.close()
    assert [one.result(TIMEOUT_S) for one in pending] == ["t", "t"]


def test_a_load_waits_too(tmp_path: Path) -> None:
    held = Held(tmp_path)
    with held.engine, AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as retry:
        threading.Timer(0.2, held.gate.set).start()
        assert retry.load("newer/x.pt")["x"][0] == 5


def test_a_commit_that_does_not_end_is_named(tmp_path: Path) -> None:
    held = Held(tmp_path)
    with held.engine, AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, backpressure_timeout_s=0.2) as retry:
        with pytest.raises(BackpressureTimeout, match="'newer'"):
            retry.latest()
        held.gate.set()


def test_a_commit_that_failed_unheard_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = Held(tmp_path)
    held.fs.fail_when(lambda op: op.name in ("fsync", "rename", "renameat2") and ".newer." in op.path, errno.EIO)
    held.gate.set()
    with (
        AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as retry,
        caplog.at_level(logging.WARNING, logger="async_ckpt"),
    ):
        assert retry.latest() == "old"
    assert any("'newer' of another engine" in record.getMessage() for record in caplog.records)
    assert held.pending.exception(TIMEOUT_S) is not None
    held.fs.heal()
    held.engine.close()


def test_a_file_where_a_directory_is_fails_at_the_second_save(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        engine.create("a")
        engine.save({"x": torch.zeros(3)}, "a/b.pt")
        for path in ("a", "a/b.pt/c", "a/b.pt"):
            with pytest.raises(PathExistsError):
                engine.save({"y": torch.zeros(3)}, path)
        engine.save({"y": torch.zeros(3)}, "ab")
        assert engine.commit("a").result(TIMEOUT_S) == "a"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a device to pin for")
def test_pinning_without_a_device_fails_at_construction(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pin_memory"):
        AsyncCheckpointEngine(tmp_path / "root", pin_memory=True)
    assert not (tmp_path / "root").exists()
