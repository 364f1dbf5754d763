"""A checkpoint that was renamed, copied, moved or linked is whole: it loads, is listed, counts, and retention leaves it
alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import async_ckpt
from async_ckpt import (
    AsyncCheckpointEngine,
    Catalog,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    KeepLast,
    UnsafePathError,
    retention,
)
from async_ckpt.cli import main
from async_ckpt.storage.filesystem import FileSystem


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with AsyncCheckpointEngine(tmp_path / "runs", staging_bytes=1 << 20) as engine:
        for number in (100, 200):
            engine.create(f"step-{number}")
            engine.save({"w": torch.full((3,), float(number))}, "sub/m.pt")
            engine.commit(f"step-{number}", {"step": number}).result(60)
    return tmp_path / "runs"


def by_tar(source: Path, target: Path) -> None:
    archive = shutil.make_archive(str(source.parent / "archive"), "tar", source)
    shutil.unpack_archive(archive, target)
    os.unlink(archive)


def by_cp(source: Path, target: Path) -> None:
    subprocess.run(["cp", "-r", source, target], check=True)


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "renamed": os.rename,
    "cp -r": by_cp,
    "tar": by_tar,
    "link": lambda source, target: target.symlink_to(source),
    "relative link": lambda source, target: target.symlink_to(os.path.relpath(source, target.parent)),
}
NAMES = ["best", "step-100-copy", "step-100 (copy)", "größe", "100"]


@pytest.mark.wide
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_it_loads_under_its_new_name(root: Path, way: str, name: str) -> None:
    WAYS[way](root / "step-100", root / name)
    catalog = Catalog(root)
    assert async_ckpt.load(root / name / "sub/m.pt")["w"].eq(100).all()
    target = {"w": torch.zeros(3)}
    async_ckpt.load_into(target, root / name / "sub/m.pt")
    assert target["w"].eq(100).all()
    assert catalog.verify(name).ok
    assert catalog.manifest(name).tag == name
    assert catalog.path(name) == root / name
    assert set(catalog.tags()) == {name, "step-200"} | ({"step-100"} if way != "renamed" else set())
    assert [(entry.tag, entry.copied_from) for entry in catalog.entries() if entry.copied_from] == [(name, "step-100")]
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20) as engine:
        assert engine.load(f"{name}/sub/m.pt")["w"].eq(100).all()
        assert engine.load(root / name / "sub/m.pt")["w"].eq(100).all()


@pytest.mark.parametrize("way", WAYS)
def test_latest_counts_it(root: Path, way: str) -> None:
    WAYS[way](root / "step-200", root / "zz")
    assert Catalog(root).latest() == ("zz" if way == "renamed" else "step-200")
    if way == "cp -r":
        shutil.rmtree(root / "step-200")
        assert Catalog(root).latest() == "zz"


@pytest.mark.parametrize("way", WAYS)
def test_list_says_what_it_is(root: Path, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    WAYS[way](root / "step-100", root / "best")
    with pytest.raises(SystemExit) as left:
        main(["list", str(root)])
    assert not left.value.code
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("best")]
    assert line.endswith("committed, copied from step-100")
    with pytest.raises(SystemExit):
        main(["list", str(root), "--json"])
    assert [item["copied_from"] for item in json.loads(capsys.readouterr().out) if item["tag"] == "best"] == [
        "step-100"
    ]
    with pytest.raises(SystemExit) as left:
        main(["verify", str(root / "best")])
    assert not left.value.code


@pytest.mark.parametrize("way", WAYS)
def test_another_root(root: Path, tmp_path: Path, way: str) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    WAYS[way](root / "step-100", other / "step-100")
    assert Catalog(other).latest() == "step-100"
    assert async_ckpt.load(other / "step-100/sub/m.pt")["w"].eq(100).all()


def test_a_root_behind_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert Catalog(tmp_path / "link").latest() == "step-200"
    assert async_ckpt.load(tmp_path / "link/step-200/sub/m.pt")["w"].eq(200).all()


@pytest.mark.parametrize("way", WAYS)
def test_retention_leaves_copies_alone_and_does_not_count_them(root: Path, way: str) -> None:
    WAYS[way](root / "step-200", root / "best")
    if way == "renamed":
        shutil.copytree(root / "best", root / "step-200")
    decisions = retention.apply(FileSystem(), str(root), KeepLast(1))
    assert [(decision.tag, decision.keep) for decision in decisions] == [("step-100", False), ("step-200", True)]
    assert sorted(os.listdir(root)) == ["best", "step-200"]


def test_damage_in_a_copy_is_damage(root: Path) -> None:
    by_cp(root / "step-200", root / "best")
    with open(root / "best/sub/m.pt", "r+b") as file:
        file.seek(500)
        file.write(b"\xff")
    assert not Catalog(root).verify("best").ok
    with pytest.raises(CorruptCheckpointError):
        async_ckpt.load(root / "best/sub/m.pt")
    assert Catalog(root).latest() == "step-200"


def test_nothing_below_the_checkpoint_is_followed(root: Path, tmp_path: Path) -> None:
    by_cp(root / "step-200", root / "best")
    os.rename(root / "best/sub/m.pt", tmp_path / "m.pt")
    (root / "best/sub/m.pt").symlink_to(tmp_path / "m.pt")
    with pytest.raises(CorruptCheckpointError, match="symbolic link"):
        async_ckpt.load(root / "best/sub/m.pt")
    os.rename(root / "step-100/manifest.json", tmp_path / "manifest.json")
    (root / "step-100/manifest.json").symlink_to(tmp_path / "manifest.json")
    assert Catalog(root).tags() == ["best", "step-200"]


def test_links_that_lead_nowhere_are_no_checkpoints(root: Path, tmp_path: Path) -> None:
    (root / "dangling").symlink_to(tmp_path / "none")
    (root / "loop").symlink_to(root / "loop")
    (root / "to-a-file").symlink_to(root / "step-100/sub/m.pt")
    (root / "empty").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    assert Catalog(root).tags() == ["step-100", "step-200"]
    for name in ("dangling", "empty"):
        with pytest.raises(CheckpointNotFoundError):
            Catalog(root).open(name)
    for name in ("loop", "to-a-file", "pipe"):
        with pytest.raises((CheckpointNotFoundError, CorruptCheckpointError, OSError)):
            Catalog(root).open(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "a/b", "a\nb", "a\0b", "x" * 300, "\u202eabc", "no such (copy)", "größe"]
)
def test_names_of_nothing_that_could_not_be_committed_are_refused(root: Path, name: str) -> None:
    for call in (Catalog(root).open, Catalog(root).verify, Catalog(root).path, Catalog(root).manifest):
        with pytest.raises(UnsafePathError):
            call(name)
