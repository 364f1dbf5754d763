"""From a path to root, tag and file; and roots that are relative, while the process changes its directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import async_ckpt
from async_ckpt import AsyncCheckpointEngine, Catalog, UnsafePathError, retention
from async_ckpt.format.names import Root
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from tests.support.making import begin


@pytest.mark.wide
@pytest.mark.parametrize(
    ("root", "path", "parts"),
    [
        ("runs", "x.pt", (None, ("x.pt",))),
        ("runs", "runs/t/sub/x.pt", ("t", ("sub", "x.pt"))),
        ("./runs", "./runs/t/x", ("t", ("x",))),
        (".", "./t/x", ("t", ("x",))),
        (".", "t/x", (None, ("t", "x"))),
        ("/abs/", "/abs/t/x", ("t", ("x",))),
        ("/abs", "/abs/t", ("t", ())),
        ("/abs", "/abs/t/", ("t", ())),
    ],
)
def test_paths_below_a_root(root: str, path: str, parts: object) -> None:
    assert Root(root).split(path) == parts


@pytest.mark.parametrize(
    "path", ["/abs/u/x", "/abs/t/../u/x", "/abs/t/", "/abs/t", "/etc/passwd", "../t/x", "/abs/tx/y", "", b"x"]
)
def test_paths_outside_a_tag(path: str) -> None:
    with pytest.raises(UnsafePathError):
        Root("/abs").split_committed(path, tag="t")


def test_the_root_itself_however_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = Root("runs")
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    assert all(root.is_named_by(path) for path in ("runs", "runs/", tmp_path / "runs", "../runs"))
    assert not root.is_named_by("runs/t")


def save(engine: AsyncCheckpointEngine, tag: str, value: float, path: str = "m.pt") -> None:
    engine.create(tag)
    engine.save({"w": torch.full((3,), value)}, path)
    engine.commit(tag).result(60)


@pytest.fixture
def go_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Leave for a directory with a root of the same relative name, and a checkpoint of the same tag in it."""
    (tmp_path / "other").mkdir()
    with AsyncCheckpointEngine(tmp_path / "other" / "runs", staging_bytes=1 << 20) as engine:
        save(engine, "t", 666.0)
    monkeypatch.chdir(tmp_path)
    return lambda: os.chdir("other")


@pytest.mark.wide
def test_an_engine_stays_with_its_root(tmp_path: Path, go_elsewhere: Callable[[], None]) -> None:
    with AsyncCheckpointEngine("runs", staging_bytes=1 << 20) as engine:
        save(engine, "t", 1.0)
        engine.create("u")
        go_elsewhere()
        engine.save({"w": torch.full((3,), 2.0)}, "runs/u/m.pt")
        engine.commit("u").result(60)
        engine.makedirs("runs", exist_ok=True)
        save(engine, "v", 3.0, "runs/v/m.pt")
        assert engine.tags() == ["t", "u", "v"]
        assert engine.latest() == "v"
        for path, value in (("t/m.pt", 1), ("runs/t/m.pt", 1), (tmp_path / "runs/u/m.pt", 2), ("runs/v/m.pt", 3)):
            assert engine.load(path)["w"].eq(value).all()
            target = {"w": torch.zeros(3)}
            engine.load_into(target, path)
            assert target["w"].eq(value).all()
    assert sorted(os.listdir(tmp_path / "runs")) == ["t", "u", "v"]
    assert os.listdir(tmp_path / "other/runs") == ["t"]


def test_a_catalog_stays_with_its_root(tmp_path: Path, go_elsewhere: Callable[[], None]) -> None:
    with AsyncCheckpointEngine("runs", staging_bytes=1 << 20) as engine:
        save(engine, "here", 1.0)
    catalog = Catalog("runs")
    with catalog.open("here") as checkpoint:
        go_elsewhere()
        assert checkpoint.entry("runs/here/m.pt").path == "m.pt"
        assert checkpoint.is_current()
    assert catalog.tags() == ["here"]
    assert catalog.latest() == "here"
    assert catalog.path("here") == tmp_path / "runs/here"
    assert async_ckpt.load(catalog.path("here") / "m.pt")["w"].eq(1).all()
    # A path that is given now is one from here.
    assert async_ckpt.load("runs/t/m.pt")["w"].eq(666).all()


def test_retention_and_staging_stay_with_their_root(tmp_path: Path, go_elsewhere: Callable[[], None]) -> None:
    class Leaving(retention.KeepLast):
        def kept(self, checkpoints: Any, now_unix_ns: int) -> dict[str, str]:
            go_elsewhere()
            return super().kept(checkpoints, now_unix_ns)

    with AsyncCheckpointEngine("runs", staging_bytes=1 << 20) as engine:
        save(engine, "t", 1.0)
        save(engine, "u", 2.0)
    deleted = [decision.tag for decision in retention.apply(FileSystem(), "runs", Leaving(1)) if not decision.keep]
    assert deleted == ["t"]
    assert (os.listdir(tmp_path / "runs"), os.listdir(tmp_path / "other/runs")) == (["u"], ["t"])
    os.chdir(tmp_path)
    staging = begin(FileSystem(), "runs", "v")
    go_elsewhere()
    transaction.abort(FileSystem(), staging)
    assert os.listdir(tmp_path / "runs") == ["u"]
