"""A retry in the same process while the engine before is still referenced; paths that exclude each other."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, BackpressureTimeout, ConfigError, PathExistsError, TransactionStateError
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

        self.fs.calls.before = hold
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
