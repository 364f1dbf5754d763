"""Deleting and its refusal: `delete`, retention that the disk will not let delete, what is refused before it is
written."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path

import pytest
import torch

from async_ckpt import (
    AsyncCheckpointEngine,
    Catalog,
    CheckpointNotFoundError,
    CommitMetrics,
    KeepBest,
    KeepLast,
    Observer,
    OutOfSpaceError,
    UnsupportedStateError,
    WriteError,
)
from async_ckpt.engine.engine import AsyncCheckpointEngine as Engine
from tests.support.faulty_filesystem import FaultyFileSystem
from tests.support.stepping import saved

STATE = {"w": torch.arange(1000.0)}


class Commits(Observer):
    def __init__(self) -> None:
        self.undeleted: list[int] = []

    def on_commit(self, metrics: CommitMetrics, error: BaseException | None) -> None:
        self.undeleted.append(metrics.num_undeleted)


def commit(engine: Engine, tag: str, **metadata: object) -> None:
    engine.create(tag)
    engine.save(STATE, "model.pt")
    pending, told = engine.commit(tag, metadata), threading.Event()
    # Warnings are told on the thread of the callbacks, before this.
    pending.add_done_callback(lambda _: told.set())
    assert pending.result(60) == tag and told.wait(60)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.wide
@pytest.mark.parametrize("call", ["rename", "unlink", "rmdir"])
@pytest.mark.parametrize("code", [errno.EBUSY, errno.EPERM])
def test_a_checkpoint_that_cannot_be_deleted_never_ends_a_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, call: str, code: int
) -> None:
    fs, commits = FaultyFileSystem(), Commits()
    with AsyncCheckpointEngine(
        tmp_path, filesystem=fs, retention=KeepLast(1), observers=(commits,), staging_bytes=1 << 20
    ) as engine:
        commit(engine, "a")
        fs.fail_when(
            lambda op: op.name == call and ("/a" in op.path or ".a." in op.path) and ".staging" not in op.path, code
        )
        for tag in ("b", "c", "d"):
            commit(engine, tag)
        assert len(warned(caplog)) == 1
        assert "'a'" in warned(caplog)[0]
        fs.heal()
        commit(engine, "e")
        assert engine.tags() == ["e"]
    assert commits.undeleted == [0, 1, 1, 1, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_a_replaced_tree_that_cannot_be_deleted_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fs, commits = FaultyFileSystem(), Commits()
    with AsyncCheckpointEngine(
        tmp_path, filesystem=fs, overwrite="replace", observers=(commits,), staging_bytes=1 << 20
    ) as engine:
        commit(engine, "a", step=1)
        fs.fail_when(lambda op: op.name == "unlink", errno.EBUSY)
        commit(engine, "a", step=2)
        commit(engine, "b")
        fs.heal()
        commit(engine, "c")
        assert step_of(engine, "a") == 2
    assert commits.undeleted == [0, 1, 1, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert len(warned(caplog)) == 1


def step_of(engine: Engine, tag: str) -> object:
    return Catalog(engine.root).manifest(tag).metadata["step"]


def test_delete(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        saved(engine, STATE, "a", path="model.pt")
        engine.delete("a")
        assert engine.tags() == []
        with pytest.raises(CheckpointNotFoundError):
            engine.delete("a")
        commit(engine, "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_refused_delete_is_an_error_and_is_finished_later(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    with AsyncCheckpointEngine(tmp_path, filesystem=fs, staging_bytes=1 << 20) as engine:
        commit(engine, "a")
        fs.fail_when(lambda op: op.name == "unlink", errno.EBUSY)
        with pytest.raises(WriteError, match="'a'"):
            engine.delete("a")
        assert engine.tags() == []
        fs.heal()
        commit(engine, "b")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_loss_that_is_not_a_number_never_ends_a_training(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, retention=KeepBest("loss"), staging_bytes=1 << 20) as engine:
        for tag, loss in (("a", float("nan")), ("b", 2.0), ("c", float("inf")), ("d", float("nan")), ("e", 3.0)):
            commit(engine, tag, loss=loss)
        assert engine.tags() == ["b", "e"]
        commit(engine, "f", loss=float("nan"))
        found = Catalog(tmp_path).manifest("f")
        assert (found.metadata, found.not_finite) == ({"loss": None}, {"metadata['loss']": "nan"})


def test_what_the_manifest_cannot_hold_is_refused_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("async_ckpt.format.manifest.MAX_MANIFEST_BYTES", 20_000)
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=4096) as engine:
        engine.create("a")
        engine.save(STATE, "model.pt")
        with pytest.raises(UnsupportedStateError, match=r"'huge\.pt' does not fit.*chunk_bytes"):
            engine.save({"w": torch.zeros(8 << 20, dtype=torch.uint8)}, "huge.pt")
        with pytest.raises(UnsupportedStateError, match="metadata"):
            engine.commit("a", {"x": "y" * 30_000})
        engine.save(STATE, "other.pt")
        engine.commit("a", {"step": 1}).result(60)
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["manifest.json", "model.pt", "other.pt"]


@pytest.mark.parametrize("call", ["create", "allocate", "pwrite", "fsync"])
def test_a_full_disk_says_what_the_file_needs(tmp_path: Path, call: str) -> None:
    fs = FaultyFileSystem()
    with AsyncCheckpointEngine(
        tmp_path, filesystem=fs, staging_bytes=1 << 20, chunk_bytes=16384, io_mode="direct"
    ) as engine:
        engine.create("a")
        fs.fail_when(lambda op: op.name == call and op.path.endswith("model.pt"), errno.ENOSPC)
        engine.save({"w": torch.zeros(300_000, dtype=torch.uint8)}, "model.pt")
        error = engine.commit("a").exception(60)
        fs.heal()
        if error is None:
            pytest.skip("this file system reserves nothing")
        assert isinstance(error, OutOfSpaceError)
        assert error.needed_bytes is not None
        assert 300_000 <= error.needed_bytes < 310_000
        assert f"needs {error.needed_bytes} bytes" in str(error)


def test_of_a_link_only_the_link_is_deleted(tmp_path: Path) -> None:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        commit(engine, "a")
        (tmp_path / "best").symlink_to("a")
        assert sorted(engine.tags()) == ["a", "best"]
        engine.delete("best")
        assert engine.tags() == ["a"] and engine.load("a/model.pt")["w"][1] == 1
        (tmp_path / "dangling").symlink_to("nowhere")
        with pytest.raises(CheckpointNotFoundError):
            engine.delete("dangling")


@pytest.mark.parametrize(("options", "looks"), [({}, False), ({"overwrite": "replace"}, True)])
def test_a_commit_looks_at_the_root_only_where_there_may_be_something_to_delete(
    tmp_path: Path, options: dict[str, object], looks: bool
) -> None:
    def num_looks() -> int:
        return sum(op.name == "listdir" and op.path == str(tmp_path) for op in fs.operations)

    fs = FaultyFileSystem()
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, filesystem=fs, **options) as engine:
        commit(engine, "a")
        before = num_looks()
        commit(engine, "b")
        assert (num_looks() > before) is looks
        engine.delete("b")
        before = num_looks()
        commit(engine, "c")
        assert num_looks() > before
