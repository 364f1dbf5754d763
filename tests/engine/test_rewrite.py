"""`rewrite=True`: a file that failed for a moment is written once more, as a whole, to a new file."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, Catalog, ConfigError, KeepLast, OutOfSpaceError, WriteError
from tests.support.faulty_filesystem import FaultyFileSystem, Operation
from tests.support.mounts import mounted
from tests.support.stepping import saved

TIMEOUT_S = 60
CHUNK = 4096
STATE = {"x": torch.arange(20_000.0), "y": torch.ones(3)}


def make_engine(root: Path, fs: FaultyFileSystem | None = None, **options: Any) -> AsyncCheckpointEngine:
    options = {"rewrite": True, "reuse": "off", "staging_bytes": 64 * CHUNK, "chunk_bytes": CHUNK, **options}
    return AsyncCheckpointEngine(root, filesystem=fs, **options)


def save(engine: AsyncCheckpointEngine, tag: str, *paths: str) -> Any:
    engine.create(tag)
    for path in paths or ("a.pt", "sub/b.pt"):
        engine.save(STATE, path)
    return engine.commit(tag)


def failure_of(engine: AsyncCheckpointEngine) -> Any:
    """Of a checkpoint that fails: `commit` raises it where it is known by then."""
    try:
        return save(engine, "t").exception(TIMEOUT_S)
    except WriteError as error:
        return error


def once(fs: FaultyFileSystem, name: str, code: int, path: str = "a.pt", at: int = 0) -> list[Operation]:
    """The call number `at` of that name on that file fails; gives it."""
    met: list[Operation] = []

    def applies(op: Operation) -> bool:
        if op.name == name and op.path.endswith(path):
            met.append(op)
            return len(met) == at + 1
        return False

    fs.fail_when(applies, code)
    return met


def assert_whole(root: Path, *tags: str) -> None:
    catalog = Catalog(root)
    assert catalog.tags() == list(tags)
    for tag in tags:
        assert catalog.verify(tag).ok
        loaded = torch.load(root / tag / "a.pt")
        assert all(torch.equal(loaded[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("io_mode", ["buffered", "direct"])
@pytest.mark.parametrize(
    ("name", "code", "at"),
    [
        *(("create", errno.EIO, 0), ("pwrite", errno.EIO, 0), ("pwrite", errno.ESTALE, 7), ("pwrite", errno.EIO, 19)),
        *(("fsync", errno.EIO, 0), ("fsync", errno.ETIMEDOUT, 0), ("close", errno.EIO, 0)),
    ],
)
def test_a_file_that_fails_once_is_written_to_a_new_one(
    tmp_path: Path, name: str, code: int, at: int, io_mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    fs = FaultyFileSystem()
    once(fs, name, code, at=at)
    with make_engine(tmp_path, fs, io_mode=io_mode) as engine:
        save(engine, "t").result(TIMEOUT_S)
    assert_whole(tmp_path, "t")
    calls = [op for op in fs.operations if op.path.endswith("a.pt") and op.outcome in ("ok", errno.errorcode[code])]
    creates = [k for k, op in enumerate(calls) if op.name == "create"]
    failed = next(k for k, op in enumerate(calls) if op.outcome == errno.errorcode[code])
    # Nothing of the first file is used again: no call on its descriptor but the close, then a new file, all of it.
    assert len(creates) == 2 and (failed == creates[0] or creates[0] < failed < creates[1])
    assert "fsync" not in [op.name for op in calls[failed + 1 : creates[1]]]
    assert (
        sum(op.num_bytes or 0 for op in calls[creates[1] :] if op.name == "pwrite")
        >= (tmp_path / "t/a.pt").stat().st_size
    )
    assert "written once more" in caplog.text


def test_a_second_failure_stands_and_tells_of_both(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    fs.fail_when(lambda op: op.name == "fsync" and op.path.endswith("a.pt"), errno.EIO)
    with make_engine(tmp_path, fs) as engine:
        error = failure_of(engine)
        assert isinstance(error, WriteError) and "when it was written once more, after" in str(error)
        assert sum(op.name == "create" and op.path.endswith("a.pt") for op in fs.operations) == 2
    assert Catalog(tmp_path).tags() == []


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EINVAL])
def test_what_does_not_pass_is_not_tried_again(tmp_path: Path, code: int) -> None:
    fs = FaultyFileSystem()
    once(fs, "fsync", code)
    with make_engine(tmp_path, fs) as engine:
        assert failure_of(engine).errno == code
    assert sum(op.name == "create" and op.path.endswith("a.pt") for op in fs.operations) == 1


def test_without_it_the_first_failure_stands(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    once(fs, "pwrite", errno.EIO)
    with make_engine(tmp_path, fs, rewrite=False) as engine:
        assert isinstance(failure_of(engine), WriteError)
    with pytest.raises(ConfigError, match="rewrite"):
        make_engine(tmp_path, rewrite="yes")


def test_a_file_larger_than_the_staging_memory_is_not_tried_again_and_says_so(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    once(fs, "fsync", errno.EIO)
    with make_engine(tmp_path, fs, staging_bytes=6 * CHUNK) as engine:
        error = failure_of(engine)
        assert "its bytes are not in staging memory any more" in str(error)
        fs.heal()
        save(engine, "u").result(TIMEOUT_S)
    assert_whole(tmp_path, "u")


def test_no_save_waits_for_memory_that_is_only_kept(tmp_path: Path) -> None:
    gate, reached, fs = threading.Event(), threading.Event(), FaultyFileSystem()

    def hold(op: Operation) -> None:
        if op.name == "fsync" and op.path.endswith("a.pt"):
            reached.set()
            gate.wait(TIMEOUT_S)

    fs.before = hold
    once(fs, "fsync", errno.EIO)
    # One file fits into staging, two do not.
    with make_engine(tmp_path, fs, staging_bytes=30 * CHUNK) as engine:
        engine.create("t")
        engine.save(STATE, "a.pt")
        assert reached.wait(TIMEOUT_S)
        engine.save(STATE, "b.pt")
        pending = engine.commit("t")
        gate.set()
        error = pending.exception(TIMEOUT_S)
        assert "its bytes are not in staging memory any more" in str(error)
        assert [one.mode for one in pending.metrics.saves] == ["eager", "eager"]


@pytest.mark.parametrize("name", ["create", "pwrite", "fsync", "close"])
def test_the_manifest_is_written_once_more_too(tmp_path: Path, name: str) -> None:
    fs = FaultyFileSystem()
    once(fs, name, errno.EIO, "manifest.json")
    with make_engine(tmp_path, fs) as engine:
        save(engine, "t").result(TIMEOUT_S)
    assert_whole(tmp_path, "t")


def test_a_full_disk_is_tried_again_once_retention_has_made_room(tmp_path: Path) -> None:
    """Room for two checkpoints: the third meets the first, which goes when the second is committed."""
    gate, reached, fs = threading.Event(), threading.Event(), FaultyFileSystem()

    def hold(op: Operation) -> None:
        if op.name == "fsync" and ".s2." in op.path and op.is_dir:
            reached.set()
            gate.wait(TIMEOUT_S)

    fs.before = hold
    state = {"x": torch.zeros(1 << 18)}
    with mounted("tmpfs", tmp_path, int(2.6 * (1 << 20))) as root:
        options: dict[str, Any] = {"staging_bytes": 8 << 20, "chunk_bytes": 1 << 16, "retention": KeepLast(1)}
        with make_engine(root, fs, **options) as engine:
            pendings = []
            for tag in ("s1", "s2", "s3"):
                engine.create(tag)
                engine.save(state, "x.pt")
                pendings.append(engine.commit(tag))
                if tag == "s1":
                    pendings[0].result(TIMEOUT_S)
                # All of the second is on the disk, and it is not committed.
                assert tag != "s2" or reached.wait(TIMEOUT_S)
            gate.set()
            for pending in pendings:
                pending.result(TIMEOUT_S)
            assert engine.tags() == ["s3"]
            # With nothing to delete, the failure stands.
            error = saved(engine, {"x": torch.zeros(1 << 19)}, "s4", path="x.pt").exception(TIMEOUT_S)
            assert isinstance(error, OutOfSpaceError) and "retention has freed no room" in str(error)
            assert engine.tags() == ["s3"] and Catalog(root).verify("s3").ok


def test_a_checkpoint_that_is_given_up_is_not_tried_again(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    once(fs, "pwrite", errno.EIO)
    with make_engine(tmp_path, fs) as engine:
        engine.create("t")
        engine.save(STATE, "a.pt")
        engine.abort("t")
        save(engine, "u").result(TIMEOUT_S)
    assert_whole(tmp_path, "u")


@pytest.mark.wide
def test_what_is_shared_with_the_last_checkpoint_is_shared_again(tmp_path: Path) -> None:
    frozen = torch.nn.Linear(64, 512).requires_grad_(False)
    fs = FaultyFileSystem()
    with mounted("xfs", tmp_path, 320 << 20) as root:
        options: dict[str, Any] = {"staging_bytes": 64 * CHUNK, "reuse": "auto", "reuse_frozen": frozen}
        with make_engine(root, fs, **options) as engine:
            for step, tag in enumerate(("s1", "s2")):
                if tag == "s2":
                    once(fs, "fsync", errno.EIO, "x.pt")
                saved(
                    engine, {**frozen.state_dict(), "trained": torch.full((9000,), float(step))}, tag, path="x.pt"
                ).result(TIMEOUT_S)
            made = [
                op for op in fs.operations if op.name == "create" and ".s2." in op.path and op.path.endswith("x.pt")
            ]
            assert len(made) == 2
        for step, tag in enumerate(("s1", "s2")):
            assert Catalog(root).verify(tag).ok
            loaded = torch.load(root / tag / "x.pt")
            assert torch.equal(loaded["weight"], frozen.weight) and torch.equal(loaded["bias"], frozen.bias)
            assert torch.equal(loaded["trained"], torch.full((9000,), float(step)))
