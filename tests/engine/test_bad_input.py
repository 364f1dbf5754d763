"""Bad input: an error of our tree that names it, nothing on disk changed, the engine still usable."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import (
    AsyncCheckpointEngine,
    Catalog,
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    PathExistsError,
    TagExistsError,
    TransactionStateError,
    UnsafePathError,
    UnsupportedStateError,
    load,
)
from tests.support.stepping import saved


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[AsyncCheckpointEngine]:
    with AsyncCheckpointEngine(tmp_path / "root", staging_bytes=1 << 20) as made:
        saved(made, {"v": torch.zeros(10)}, "old", path="m.pt").result(60)
        yield made


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"<dir>" for p in sorted(root.rglob("*"))}


def still_works(engine: AsyncCheckpointEngine) -> None:
    saved(engine, {"v": torch.ones(10)}, "next", path="m.pt").result(60)
    assert torch.equal(engine.load("next/m.pt")["v"], torch.ones(10))


BAD_TAGS = [
    "",
    ".",
    "..",
    "a/b",
    "/abs",
    "a\0b",
    ".hidden",
    "x" * 300,
    "tab\t",
    "new\nline",
    "back\\slash",
    "ünïcode",
    "a/../b",
    " ",
    "trail ",
]


@pytest.mark.wide
@pytest.mark.parametrize("tag", BAD_TAGS, ids=repr)
def test_bad_tag(engine: AsyncCheckpointEngine, tmp_path: Path, tag: str) -> None:
    before = tree(tmp_path)
    for call in (engine.create, engine.commit):
        with pytest.raises(UnsafePathError):
            call(tag)
    assert tree(tmp_path) == before
    still_works(engine)


BAD_PATHS = [
    "",
    "..",
    "../x.pt",
    "a/../../x.pt",
    "/etc/x.pt",
    "a\0b",
    "a//b.pt",
    "x" * 300,
    "./.hidden",
    "a\nb",
    "dir/",
]


@pytest.mark.parametrize("path", BAD_PATHS, ids=repr)
def test_bad_path(engine: AsyncCheckpointEngine, tmp_path: Path, path: str) -> None:
    engine.create("t")
    before = tree(tmp_path)
    with pytest.raises((UnsafePathError, TransactionStateError)):
        engine.save({"v": torch.zeros(1)}, path)
    with pytest.raises((UnsafePathError, TransactionStateError)):
        engine.makedirs(path)
    assert tree(tmp_path) == before
    engine.abort("t")
    still_works(engine)


def test_path_of_another_root(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    engine.create("t")
    with pytest.raises(UnsafePathError):
        engine.save({}, tmp_path / "elsewhere" / "t" / "m.pt")
    engine.abort("t")


def test_symlink_out_of_the_root(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "m.pt").write_bytes(b"secret")
    (tmp_path / "root" / "link").symlink_to(outside)
    with pytest.raises(CheckpointError):
        engine.create("link")
    with pytest.raises(CheckpointError):
        engine.load("link/m.pt")
    assert "link" not in engine.tags()
    assert tree(outside) == {"m.pt": b"secret"}
    still_works(engine)


def test_unknown_tag_and_file(engine: AsyncCheckpointEngine) -> None:
    with pytest.raises(CheckpointNotFoundError, match="old"):
        engine.load("nope/m.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"m\.pt"):
        engine.load("old/nope.pt")
    with pytest.raises(FileNotFoundError):
        engine.load_into({}, "nope/m.pt")
    with pytest.raises(TransactionStateError, match="nope"):
        engine.commit("nope")


def test_save_without_create(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(TransactionStateError, match="create"):
        engine.save({"v": torch.zeros(1)}, "m.pt")
    with pytest.raises(TransactionStateError, match="create"):
        engine.makedirs("sub")
    assert tree(tmp_path) == before
    still_works(engine)


def test_commit_twice(engine: AsyncCheckpointEngine) -> None:
    pending = saved(engine, {"v": torch.zeros(1)}, path="m.pt")
    with pytest.raises(TransactionStateError, match="'t'"):
        engine.commit("t")
    with pytest.raises(TransactionStateError, match="'t'"):
        engine.save({"v": torch.zeros(1)}, engine.root + "/t/n.pt")
    assert pending.result(60) == "t"
    still_works(engine)


def test_create_twice_and_existing_tag(engine: AsyncCheckpointEngine, tmp_path: Path) -> None:
    with pytest.raises(TagExistsError, match="old"):
        engine.create("old")
    engine.create("t")
    with pytest.raises(TransactionStateError, match="open already"):
        engine.create("t")
    engine.abort("t")
    still_works(engine)


def test_same_path_twice(engine: AsyncCheckpointEngine) -> None:
    engine.create("t")
    engine.save({"v": torch.zeros(1)}, "m.pt")
    with pytest.raises(PathExistsError, match=r"m\.pt"):
        engine.save({"v": torch.ones(1)}, "m.pt")
    with pytest.raises(PathExistsError):
        engine.save({"v": torch.ones(1)}, "m.pt/inside.pt")
    with pytest.raises(UnsafePathError, match="manifest"):
        engine.save({"v": torch.ones(1)}, "manifest.json")
    engine.commit("t").result(60)
    assert torch.equal(engine.load("t/m.pt")["v"], torch.zeros(1))


UNSAVABLE: list[tuple[str, Callable[[], Any], str]] = [
    ("lambda", lambda: {"a": {"fn": lambda: 0}}, r"\['a'\]\['fn'\]"),
    ("generator", lambda: {"a": [1, (x for x in ())]}, r"\['a'\]\[1\]"),
    ("two dtypes", _two := lambda: {"x": (t := torch.zeros(4)), "y": t.view(torch.int32)}, "dtype|type"),
]


@pytest.mark.parametrize(("make", "where"), [(m, w) for _, m, w in UNSAVABLE], ids=[n for n, _, _ in UNSAVABLE])
def test_unsavable_state(engine: AsyncCheckpointEngine, make: Callable[[], Any], where: str) -> None:
    engine.create("t")
    with pytest.raises(UnsupportedStateError, match=where) as caught:
        engine.save(make(), "bad.pt")
    assert isinstance(caught.value, TypeError)
    engine.save({"v": torch.ones(1)}, "good.pt")
    engine.commit("t").result(60)
    assert sorted(e.path for e in Catalog(engine.root).manifest("t").files) == ["good.pt"]


def test_bad_metadata(engine: AsyncCheckpointEngine) -> None:
    engine.create("t")
    with pytest.raises(UnsupportedStateError, match="loss"):
        engine.commit("t", metadata={"loss": torch.ones(1)})
    engine.commit("t", metadata={"loss": 1.0}).result(60)


BAD_CONFIG: list[tuple[dict[str, Any], str]] = [
    ({"staging_byte": 1 << 30}, "staging_bytes"),
    ({"staging_bytes": "4GB"}, "bytes"),
    ({"staging_bytes": 4.5}, "bytes"),
    ({"staging_bytes": 4}, "smaller than one chunk"),
    ({"staging_bytes": 1 << 20, "chunk_bytes": 1 << 22}, "smaller than one chunk"),
    ({"chunk_bytes": 5000}, "multiple of 4096"),
    ({"overwrite": "yes"}, "overwrite"),
    ({"num_writers": 0}, "num_writers"),
    ({"backpressure_timeout_s": "5s"}, "seconds"),
    ({"backpressure_timeout_s": -1}, "seconds"),
    ({"storage_alignment": 1 << 20}, "storage_alignment"),
    ({"format": "hdf5"}, "format"),
    ({"max_pending_commits": True}, "max_pending_commits"),
]


@pytest.mark.parametrize(
    ("fields", "named"), BAD_CONFIG, ids=[next(iter(f)) + str(n) for n, (f, _) in enumerate(BAD_CONFIG)]
)
def test_bad_config(tmp_path: Path, fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        AsyncCheckpointEngine(tmp_path / "fresh", **fields)
    assert isinstance(caught.value, ValueError)
    assert not (tmp_path / "fresh").exists()


def test_root_missing_from_config_and_empty() -> None:
    for params in (None, {}, "", {"root": 5}, {"root": "a\0b"}, 7):
        with pytest.raises(ConfigError, match=r"root|expected"):
            AsyncCheckpointEngine(params)  # type: ignore[arg-type]


def test_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    with pytest.raises(CheckpointError, match=r"/f"):
        AsyncCheckpointEngine(tmp_path / "f", staging_bytes=1 << 20)
    assert (tmp_path / "f").read_text() == "x"


def test_root_is_made_when_missing_but_not_for_reading(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        Catalog(tmp_path / "no" / "such").tags()
    assert not (tmp_path / "no").exists()
    AsyncCheckpointEngine(tmp_path / "no" / "such", staging_bytes=1 << 20).close()
    assert Catalog(tmp_path / "no" / "such").tags() == []


def test_load_of_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"v": 1}, tmp_path / "plain.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"torch\.load"):
        load(tmp_path / "plain.pt")
    with pytest.raises(CheckpointNotFoundError):
        load(tmp_path / "absent.pt")


def test_use_after_close(tmp_path: Path) -> None:
    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20)
    engine.close()
    engine.close()
    calls: list[Callable[[], Any]] = [
        lambda: engine.create("t"),
        lambda: engine.save({}, "m.pt"),
        lambda: engine.commit("t"),
        lambda: engine.load("t/m.pt"),
        lambda: engine.makedirs("x"),
    ]
    for call in calls:
        with pytest.raises(TransactionStateError, match="closed"):
            call()


def test_closing_with_an_open_checkpoint_warns_and_publishes_nothing(tmp_path: Path) -> None:
    engine = AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20)
    engine.create("t")
    engine.save({"v": torch.zeros(5)}, "m.pt")
    with pytest.warns(RuntimeWarning, match="'t'"):
        engine.close()
    assert os.listdir(tmp_path) == []
