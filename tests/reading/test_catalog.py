"""The catalog and verification: what is listed, what is damaged and where, and what a reader sees of races."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from async_ckpt.errors import (
    CheckpointNotFoundError,
    CommitError,
    ConfigError,
    CorruptCheckpointError,
    UnsafePathError,
)
from async_ckpt.host.process import OwnerState
from async_ckpt.reading.catalog import Catalog
from async_ckpt.reading.committed import read_back, verify_files
from async_ckpt.storage import transaction
from async_ckpt.storage.filesystem import FileSystem
from tests.support.faulty_filesystem import FaultyFileSystem

from ..support.comparing import flip
from ..support.making import NEW, OLD, commit, entry, private_names, stage


@pytest.mark.wide
def test_order_is_that_of_the_commits(tmp_path: Path) -> None:
    for number, tag in enumerate(["b", "a", "c"]):
        commit(tmp_path, tag, created=number + 1)
    catalog = Catalog(tmp_path)
    assert catalog.tags() == ["b", "a", "c"]
    assert catalog.latest() == "c"
    assert catalog.manifest("a").metadata == {"step": 2}
    assert catalog.path("a") == tmp_path / "a"
    assert (catalog.path("a") / "model.bin").read_bytes() == OLD["model.bin"]


def test_nothing_there(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    assert catalog.tags() == []
    assert catalog.latest() is None
    assert catalog.staging() == []
    for call in (catalog.path, catalog.manifest, catalog.open, catalog.verify):
        with pytest.raises(CheckpointNotFoundError, match="nothing"):
            call("t")
        with pytest.raises(UnsafePathError):
            call("../t")


def test_root_that_is_not_there_or_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("missing", "file"):
        catalog = Catalog(tmp_path / name)
        for call in (catalog.tags, catalog.latest, catalog.staging):
            with pytest.raises(CheckpointNotFoundError, match=name):
                call()


def test_only_checkpoints_are_listed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    commit(tmp_path / "elsewhere", "t")
    root = tmp_path / "root"
    root.mkdir()
    commit(root, "good")
    (root / "logs").mkdir()
    (root / "file").write_text("")
    (root / "link").symlink_to(tmp_path / "elsewhere" / "t")
    shutil.copytree(root / "good", root / ".hidden")
    shutil.copytree(root / "good", root / "bad name ")
    shutil.copytree(root / "good", root / "renamed")
    staging = stage(FileSystem(), root, "staged", OLD)
    catalog = Catalog(root)
    assert sorted(catalog.tags()) == ["bad name ", "good", "link", "renamed"]
    assert {item.tag: item.copied_from for item in catalog.entries()} == {
        "good": None,
        "bad name ": "good",
        "link": "t",
        "renamed": "good",
    }
    assert [(item.kind, item.tag, item.owner_state) for item in catalog.staging()] == [
        ("staging", "staged", OwnerState.ALIVE)
    ]
    transaction.abort(FileSystem(), staging)


def test_every_flipped_byte_is_found(fast_path: Path) -> None:
    files = {"a": os.urandom(300), "sub/b": os.urandom(100)}
    commit(fast_path, "older")
    commit(fast_path, "t", files, created=2)
    catalog = Catalog(fast_path)
    for name, data in files.items():
        for at in range(0, len(data), 7):
            flip(fast_path / "t" / name, at)
            report = catalog.verify("t", num_threads=1)
            assert [problem.path for problem in report.problems] == [name]
            flip(fast_path / "t" / name, at)
    assert catalog.verify("t").ok


DAMAGE = {
    "flipped": lambda path: flip(path, 5000),
    "truncated": lambda path: os.truncate(path, 100),
    "grown": lambda path: os.truncate(path, 20000),
    "missing": lambda path: path.unlink(),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "link": lambda path: (path.rename(path.parent.parent.parent / "moved"), path.symlink_to("../../moved")),
    "swapped": lambda path: path.write_bytes(b"bad" * 3000),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", DAMAGE)
def test_latest_skips_damage_and_logs_it(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "root"
    root.mkdir()
    commit(root, "good", created=1)
    commit(root, "bad", created=2)
    DAMAGE[damage](root / "bad" / "model.bin")
    catalog = Catalog(root)
    report = catalog.verify("bad")
    assert report.problems[0].path == "model.bin"
    with pytest.raises(CorruptCheckpointError, match=r"model\.bin"):
        report.raise_if_bad()
    with caplog.at_level(logging.WARNING, "async_ckpt"):
        assert catalog.latest() == "good"
    assert "'bad'" in caplog.text
    assert "model.bin" in caplog.text
    assert catalog.latest(verify="size") == ("bad" if damage in ("flipped", "swapped") else "good")
    assert catalog.latest(verify="off") == "bad"


MANIFEST_DAMAGE = {
    "flipped": lambda path: flip(path, 50),
    "empty": lambda path: path.write_bytes(b""),
    "link": lambda path: (path.rename(path.parent / "m"), path.symlink_to("m")),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "huge": lambda path: os.truncate(path, 1 << 40),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("damage", MANIFEST_DAMAGE)
def test_a_damaged_manifest_is_not_listed(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    commit(tmp_path, "good", created=1)
    commit(tmp_path, "bad", created=2)
    MANIFEST_DAMAGE[damage](tmp_path / "bad" / "manifest.json")
    catalog = Catalog(tmp_path)
    assert catalog.tags() == ["good"]
    assert "'bad'" in caplog.text
    assert catalog.latest() == "good"
    report = catalog.verify("bad")
    assert [problem.path for problem in report.problems] == ["manifest.json"]
    with pytest.raises(CorruptCheckpointError):
        catalog.manifest("bad")


def test_extra_files_are_named_and_empty_directories_are_fine(tmp_path: Path) -> None:
    commit(tmp_path, "t", NEW)
    (tmp_path / "t" / "empty" / "deeper").mkdir(parents=True)
    assert Catalog(tmp_path).verify("t").ok
    (tmp_path / "t" / "other" / "more\n").write_text("")
    (tmp_path / "t" / "empty" / "x").write_text("")
    (tmp_path / "t" / "link").symlink_to("/")
    for name in ("eval_results.json", ".DS_Store", ".nfs0000000000000001", ".ipynb_checkpoints"):
        (tmp_path / "t" / name).write_text("")
    for level in ("size", "full"):
        report = Catalog(tmp_path).verify("t", level=level)
        assert report.ok
        assert sorted(report.extra) == sorted(
            [
                "empty/x",
                "link",
                "other/more\\n",
                "eval_results.json",
                ".DS_Store",
                ".nfs0000000000000001",
                ".ipynb_checkpoints",
            ]
        )
    assert Catalog(tmp_path).latest() == "t"


@pytest.mark.parametrize("extent_bytes", [1, 1000, 4096, 5 << 20, 64 << 20])
@pytest.mark.parametrize("direct", [True, False])
def test_extents_of_every_size(fast_path: Path, extent_bytes: int, direct: bool) -> None:
    num_bytes = 5000 if extent_bytes == 1 else 12_000_001
    data = random.Random(0).randbytes(num_bytes)
    (fast_path / "f").write_bytes(data)
    item = entry("f", data, extent_bytes)
    handle = FileSystem().open_dir(str(fast_path))
    seen: list[tuple[int, int]] = []
    assert verify_files(handle, [item], direct=direct, progress=lambda *done: seen.append(done)) == []
    assert seen[-1] == (num_bytes, num_bytes)
    at = num_bytes * 2 // 3
    flip(fast_path / "f", at)
    problems = verify_files(handle, [item], direct=direct)
    assert len(problems) == 1
    assert problems[0].offset == at // extent_bytes * extent_bytes
    handle.close()


def test_many_files_need_few_descriptors(fast_path: Path) -> None:
    files = {f"f{number}": b"%d" % number for number in range(400)}
    commit(fast_path, "t", files)
    flip(fast_path / "t" / "f7", 0)
    (fast_path / "t" / "f399").unlink()
    fs = FaultyFileSystem()
    report = Catalog(fast_path, fs).verify("t")
    assert [problem.path for problem in report.problems] == ["f7", "f399"]
    num_open = most_open = 0
    for op in fs.operations:
        num_open += (op.name == "open" and op.outcome == "ok") - (op.name == "close")
        most_open = max(most_open, num_open)
    assert num_open == 0
    assert most_open < 140


def test_progress_may_raise(fast_path: Path) -> None:
    commit(fast_path, "t", {"a": bytes(20 << 20)})

    def stop(done_bytes: int, total_bytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Catalog(fast_path).verify("t", progress=stop)


def test_disk_errors_are_damage_and_shortages_are_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    commit(tmp_path, "good", created=1)
    commit(tmp_path, "bad", created=2)
    fs = FaultyFileSystem()
    catalog = Catalog(tmp_path, fs)
    fs.fail_when(lambda op: op.name == "read" and op.path.endswith("bad/model.bin"), errno.EIO)
    assert catalog.latest() == "good"
    assert "Input/output error" in caplog.text
    fs.heal()
    fs.fail_when(lambda op: op.name == "read" and op.path.endswith("bad/manifest.json"), errno.EIO)
    assert catalog.tags() == ["good"]
    fs.heal()
    fs.fail_when(lambda op: op.name == "open" and op.path.endswith("/bad"), errno.EIO)
    assert catalog.latest() == "good"
    fs.heal()
    fs.fail_when(lambda op: op.name == "listdir" and op.path.endswith("/bad"), errno.EIO)
    assert catalog.latest() == "good"
    fs.heal()
    fs.fail_when(lambda op: op.name == "open" and op.path.endswith("model.bin"), errno.EMFILE)
    with pytest.raises(OSError, match="Too many open files"):
        catalog.latest()
    assert sum(op.name == "open" and op.outcome == "ok" for op in fs.operations) == sum(
        op.name == "close" for op in fs.operations
    )


@pytest.mark.parametrize("change", ["replaced", "deleted", "deleted in part"])
def test_a_checkpoint_that_changes_while_it_is_read(tmp_path: Path, change: str) -> None:
    commit(tmp_path, "t", OLD)
    fs = FaultyFileSystem()
    done = threading.Event()

    def meddle(op: object) -> None:
        if op.name == "open" and op.path.endswith("model.bin") and not done.is_set():  # type: ignore[attr-defined]
            done.set()
            if change == "replaced":
                commit(tmp_path, "t", NEW, overwrite="replace")
            elif change == "deleted":
                transaction.remove(FileSystem(), str(tmp_path), "t")
            else:
                (tmp_path / "t").rename(tmp_path / "moved")
                (tmp_path / "moved" / "model.bin").unlink()

    fs.before = meddle
    catalog = Catalog(tmp_path, fs)
    if change == "replaced":
        report = catalog.verify("t")
        assert report.ok
        assert report.num_files == len(NEW)
    else:
        with pytest.raises(CheckpointNotFoundError):
            catalog.verify("t")
        assert catalog.latest() is None


def test_an_open_checkpoint_stays_the_same(tmp_path: Path) -> None:
    commit(tmp_path, "t", OLD)
    with Catalog(tmp_path).open("t") as checkpoint:
        file = checkpoint.open_file(checkpoint.entry("model.bin"))
        commit(tmp_path, "t", NEW, overwrite="replace")
        assert file.read(0, file.size_bytes) == OLD["model.bin"]
        file.close()
        assert not checkpoint.is_current()
        with pytest.raises(CheckpointNotFoundError, match="replaced"):
            checkpoint.open_file(checkpoint.entry(tmp_path / "t" / "sub" / "optim.bin"))
        with pytest.raises(CheckpointNotFoundError, match=r"model\.bin"):
            checkpoint.entry("none")
        with pytest.raises(UnsafePathError):
            checkpoint.entry("../x")


def test_nothing_is_ever_written(tmp_path: Path) -> None:
    commit(tmp_path, "t")
    staged = tmp_path / private_name(tmp_path)
    fs = FaultyFileSystem()
    catalog = Catalog(tmp_path, fs)
    catalog.tags()
    catalog.latest()
    catalog.staging()
    catalog.path("t")
    assert {op.name for op in fs.operations} <= {"open", "close", "read", "listdir", "lstat"}
    assert staged.exists()
    shutil.rmtree(staged)


def private_name(root: Path) -> str:
    fs = FaultyFileSystem()
    staging = stage(fs, root, "crashed", OLD)
    assert staging.lock is not None
    staging.lock.close()
    assert len(private_names(root)) == 1
    return os.path.basename(staging.path)


def test_unknown_levels_are_refused(tmp_path: Path) -> None:
    for call in (lambda: Catalog(tmp_path).latest("ful"), lambda: Catalog(tmp_path).verify("t", level="yes")):
        with pytest.raises(ConfigError, match="'full', 'size' or 'off'"):
            call()


def test_read_back_compares_the_disk_with_the_entries(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 9000)
    good = entry("a", b"x" * 9000)
    read_back(FileSystem(), str(tmp_path), [good])
    flip(tmp_path / "a", 8999)
    with pytest.raises(CommitError, match="nothing was committed") as caught:
        read_back(FileSystem(), str(tmp_path), [good])
    assert caught.value.step == "read back"


def test_the_disk_side_needs_no_torch() -> None:
    modules = "retention, format.manifest, reading.catalog, reading.committed, storage.filesystem, storage.transaction"
    code = (
        f"import sys, {', '.join(f'async_ckpt.{name}' for name in modules.split(', '))}; sys.exit('torch' in "
        "sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
