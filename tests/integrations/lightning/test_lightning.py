"""The plugin under the real Trainer: same files as stock Lightning, exact resume, nothing before its commit, loud
failures.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import itertools
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from ...support.comparing import flip, same

pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.callbacks import ModelCheckpoint  # noqa: E402

from async_ckpt import (  # noqa: E402
    CheckpointNotFoundError,
    CommitError,
    ConfigError,
    CorruptCheckpointError,
    Observer,
    Tolerate,
    UnsupportedStateError,
)
from async_ckpt.integrations.lightning import AsyncCkptIO, framework  # noqa: E402
from async_ckpt.integrations.lightning.single_file import CheckpointFile  # noqa: E402
from tests.support.faulty_filesystem import FaultyFileSystem  # noqa: E402
from tests.support.insides import commits_of  # noqa: E402

from .jobs import GatedFileSystem, Job, data, job, trainer  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.wide]

SMALL: dict[str, Any] = {"staging_bytes": 1 << 20, "chunk_bytes": 65536}


def plugin(**config: Any) -> AsyncCkptIO:
    return AsyncCkptIO(**{**SMALL, **config})


def visible(folder: Path) -> dict[str, str]:
    """Names of the checkpoint files, and where links point."""
    return {
        p.name: (os.readlink(p) if p.is_symlink() else "file")
        for p in sorted(folder.iterdir())
        if not p.name.startswith(".")
    }


def place(path: Path) -> CheckpointFile:
    return CheckpointFile(str(path))


CALLBACKS: dict[str, dict[str, Any]] = {
    "default": {},
    "every_step_kept": {"save_top_k": -1, "every_n_train_steps": 1},
    "name_counter": {"save_top_k": -1, "monitor": "wave", "every_n_train_steps": 1, "filename": "model"},
    "same_name_again": {"save_top_k": 1, "every_n_train_steps": 1, "filename": "model"},
    "top_2_and_last": {
        "save_top_k": 2,
        "monitor": "wave",
        "every_n_train_steps": 1,
        "save_last": True,
        "filename": "{step}-{wave:.0f}",
    },
    "top_1_of_few_names": {
        "save_top_k": 1,
        "monitor": "wave",
        "every_n_train_steps": 1,
        "mode": "max",
        "filename": "best-{wave:.0f}",
    },
    "link": {"save_top_k": 2, "monitor": "wave", "every_n_train_steps": 2, "save_last": "link"},
    "link_of_newest": {"save_top_k": 1, "every_n_train_steps": 1, "save_last": "link"},
    "weights_only": {"save_weights_only": True, "every_n_train_steps": 3, "save_top_k": -1},
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_the_same_files_as_stock_lightning(tmp_path: Path, name: str) -> None:
    found = {}
    for kind, io in (("stock", None), ("ours", plugin())):
        folder = tmp_path / kind
        trainer(folder, io, callbacks=[ModelCheckpoint(dirpath=folder, **CALLBACKS[name])], max_epochs=2).fit(
            job(), data()
        )
        found[kind] = folder
    assert visible(found["ours"]) == visible(found["stock"]) != {}
    for file in visible(found["stock"]):
        a = torch.load(found["stock"] / file, weights_only=False)
        b = torch.load(found["ours"] / file, weights_only=False)
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "loops"):
            assert same(a.get(key), b.get(key)), f"{file}: {key}"
        with zipfile.ZipFile(found["ours"] / file) as archive:
            assert archive.testzip() is None
    records = [p.name for p in (found["ours"] / ".async_ckpt").iterdir()]
    assert sorted(records) == sorted(f for f, kind in visible(found["ours"]).items() if kind == "file"), (
        "a manifest for each file, no more"
    )


@pytest.mark.parametrize("save_last", [True, "link"])
def test_resume_is_exact_in_stock_too(tmp_path: Path, save_last: Any) -> None:
    whole = job()
    trainer(tmp_path / "whole", callbacks=[], max_epochs=3, enable_checkpointing=False).fit(whole, data())
    folder = tmp_path / "part"

    def callback() -> Any:
        return ModelCheckpoint(dirpath=folder, save_top_k=1, every_n_train_steps=6, save_last=save_last)

    first = job()
    trainer(folder, plugin(), callbacks=[callback()], max_epochs=1).fit(first, data())
    for io in (plugin(), None):
        second = Job()
        trainer(folder, io, callbacks=[], max_epochs=3, enable_checkpointing=False).fit(
            second, data(), ckpt_path=str(folder / "last.ckpt")
        )
        assert first.losses + second.losses == whole.losses
        assert same(dict(second.state_dict()), dict(whole.state_dict()))
    third = Job()
    again = trainer(folder, plugin(), callbacks=[callback()], max_epochs=3)
    again.fit(third, data(), ckpt_path="last")
    assert first.losses + third.losses == whole.losses
    assert Job.load_from_checkpoint(again.checkpoint_callback.best_model_path, weights_only=False).hparams.width == 8  # type: ignore[attr-defined]


def test_the_snapshot_is_of_the_save_not_of_later_steps(tmp_path: Path) -> None:
    files = GatedFileSystem()
    io, model, expected = plugin(filesystem=files), job(), {}

    def at_step(t: Any) -> None:
        if t.global_step == 2:
            files.gate.clear()
            t.save_checkpoint(tmp_path / "x.ckpt")
            expected.update({k: v.clone() for k, v in model.state_dict().items()})
            assert io.is_pending(tmp_path / "x.ckpt") and not (tmp_path / "x.ckpt").exists()
        if t.global_step == 5:
            assert not (tmp_path / "x.ckpt").exists(), "nothing may be seen before the commit"
            files.gate.set()

    model.at_step = at_step
    trainer(tmp_path, io, enable_checkpointing=False).fit(model, data())
    assert same(dict(torch.load(tmp_path / "x.ckpt", weights_only=False)["state_dict"]), expected)


def test_nothing_old_goes_before_the_new_is_durable(tmp_path: Path) -> None:
    """Deletion of a file, a link's switch and the hook all wait for the commit."""
    files, seen = GatedFileSystem(), []

    def on_commit(path: str) -> None:
        seen.append((Path(path).name, torch.load(path, weights_only=False)["global_step"]))

    io = plugin(filesystem=files, on_commit=on_commit)
    model = job()

    def at_step(t: Any) -> None:
        if t.global_step == 1:
            io.wait()
            assert visible(tmp_path) == {"epoch=0-step=1.ckpt": "file", "last.ckpt": "epoch=0-step=1.ckpt"}
            files.gate.clear()
        if t.global_step in (2, 3):
            assert visible(tmp_path) == {"epoch=0-step=1.ckpt": "file", "last.ckpt": "epoch=0-step=1.ckpt"}
            assert [name for name, _ in seen] == ["epoch=0-step=1.ckpt"]
        if t.global_step == 3:
            files.gate.set()
            io.wait()
            assert visible(tmp_path) == {"epoch=0-step=3.ckpt": "file", "last.ckpt": "epoch=0-step=3.ckpt"}

    model.at_step = at_step
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=1, every_n_train_steps=1, save_last="link")
    # Our module's hook runs after the callback's.
    trainer(tmp_path, io, callbacks=[checkpoint], limit_train_batches=4).fit(model, data())
    assert seen == [(f"epoch=0-step={n}.ckpt", n) for n in (1, 2, 3, 4)]


def test_a_failed_commit_raises_at_the_next_save_and_keeps_the_old_file(tmp_path: Path) -> None:
    files = GatedFileSystem()
    io, model, steps = plugin(filesystem=files), job(), []

    def at_step(t: Any) -> None:
        steps.append(t.global_step)
        if t.global_step == 1:
            io.wait()
            files.fail_manifest = OSError(errno.EIO, "broken disk")
        if t.global_step == 2:
            if (unfinished := commits_of(io.engine).find_unfinished("epoch=0-step=2.ckpt")) is not None:
                unfinished.wait(60)
            files.fail_manifest = None

    model.at_step = at_step
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=1, every_n_train_steps=1, save_last="link")
    with pytest.raises(CommitError, match="broken disk"):
        trainer(tmp_path, io, callbacks=[checkpoint]).fit(model, data())
    assert steps == [1, 2], "the save of step 3 raises"
    assert visible(tmp_path) == {"epoch=0-step=1.ckpt": "file", "last.ckpt": "epoch=0-step=1.ckpt"}


def test_a_tolerated_failure_lets_training_go_on_and_keeps_the_old_file(tmp_path: Path) -> None:
    files = FaultyFileSystem()
    files.fail_when(lambda op: op.name == "fsync" and ".epoch=0-step=2.ckpt." in op.path, errno.EIO)
    io = plugin(filesystem=files, on_commit_failure=Tolerate(consecutive=2))
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_top_k=1, every_n_train_steps=1, save_last="link")
    trainer(tmp_path, io, callbacks=[checkpoint], limit_train_batches=3, max_epochs=1).fit(job(), data())
    # What the lost file was to replace stays.
    assert visible(tmp_path) == {
        "epoch=0-step=1.ckpt": "file",
        "epoch=0-step=3.ckpt": "file",
        "last.ckpt": "epoch=0-step=3.ckpt",
    }
    files.fail_when(lambda op: op.name == "fsync" and ".epoch=" in op.path, errno.EIO)
    io = plugin(filesystem=files, on_commit_failure=Tolerate(consecutive=2))
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "b", save_top_k=1, every_n_train_steps=1)
    with pytest.raises(CommitError, match="2 checkpoints in a row"):
        trainer(tmp_path, io, callbacks=[checkpoint], limit_train_batches=2, max_epochs=1).fit(job(), data())


def test_a_failed_last_commit_raises_at_teardown(tmp_path: Path) -> None:
    files = GatedFileSystem()
    files.fail_manifest = OSError(errno.ENOSPC, "no space left")
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=6)
    with pytest.raises(OSError, match="no space left") as caught:
        trainer(tmp_path, plugin(filesystem=files), callbacks=[checkpoint]).fit(job(), data())
    assert caught.value.errno == errno.ENOSPC
    assert visible(tmp_path) == {}


def test_a_save_by_hand_after_fit_is_there_when_it_returns(tmp_path: Path) -> None:
    files = GatedFileSystem()
    files.gate.set()
    io, model = plugin(filesystem=files), job()
    t = trainer(tmp_path, io, callbacks=[ModelCheckpoint(dirpath=tmp_path)], max_epochs=1)
    t.fit(model, data())
    t.save_checkpoint(tmp_path / "by_hand.ckpt")
    assert Job.load_from_checkpoint(tmp_path / "by_hand.ckpt", weights_only=False).hparams.width == 8  # type: ignore[attr-defined]
    assert io.engine is None, "nobody would stop its threads"
    files.fail_manifest = OSError(errno.EIO, "by hand")
    try:
        raise KeyError
    except KeyError:
        # Raised, though another exception is being handled.
        with pytest.raises(CommitError, match="by hand"):
            t.save_checkpoint(tmp_path / "lost.ckpt")
    files.fail_manifest = None
    # The next training overlaps again.
    files.gate.clear()
    io.prepare(tmp_path)
    io.save_checkpoint(STATE, tmp_path / "later.ckpt")
    assert io.is_pending(tmp_path / "later.ckpt")
    files.gate.set()
    io.teardown()


@pytest.mark.parametrize("left", [KeyError("the user's"), SystemExit(0)])
def test_the_users_own_exception_is_not_replaced_unless_it_hides_a_failure(tmp_path: Path, left: BaseException) -> None:
    files, model = GatedFileSystem(), job()
    files.fail_manifest = OSError(errno.EIO, "broken disk")

    def at_step(t: Any) -> None:
        raise left

    model.at_step = at_step
    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=1)
    kind, words = (KeyError, "the user's") if isinstance(left, KeyError) else (OSError, "broken disk")
    with pytest.raises(kind, match=words):
        trainer(tmp_path, plugin(filesystem=files), callbacks=[checkpoint]).fit(model, data())


def test_a_failing_hook_is_raised(tmp_path: Path) -> None:
    def on_commit(path: str) -> None:
        raise ValueError("upload refused")

    checkpoint = ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=6)
    with pytest.raises(ValueError, match="upload refused"):
        trainer(tmp_path, plugin(on_commit=on_commit), callbacks=[checkpoint]).fit(job(), data())
    assert len(visible(tmp_path)) == 1


# The plugin alone.

STATE: dict[str, Any] = {"state_dict": {"w": torch.arange(50_000.0)}, "global_step": 7, "epoch": 1}


def saved(tmp_path: Path, name: str = "a.ckpt", **config: Any) -> AsyncCkptIO:
    io = plugin(**config)
    io.save_checkpoint(STATE, tmp_path / name)
    io.wait()
    return io


@pytest.mark.parametrize(
    "name", ["a.ckpt", "epoch=1-step=2-val_loss=0.10.ckpt", "{odd} names ü.ckpt", ".hidden.ckpt", "x" * 150 + ".ckpt"]
)
def test_any_file_name(tmp_path: Path, name: str) -> None:
    io = saved(tmp_path, name)
    io.teardown()
    assert same(io.load_checkpoint(tmp_path / name), STATE)
    assert same(torch.load(tmp_path / name), STATE)
    io.remove_checkpoint(tmp_path / name)
    assert [p.name for p in tmp_path.rglob("*")] == [".async_ckpt"]


@pytest.mark.parametrize("where", ["payload", "head", "cut", "longer"])
def test_damage_is_found(tmp_path: Path, where: str) -> None:
    io = saved(tmp_path)
    io.teardown()
    file = tmp_path / "a.ckpt"
    if where in ("payload", "head"):
        flip(file, 100_000 if where == "payload" else 3)
    else:
        os.truncate(file, file.stat().st_size + (1 if where == "longer" else -1))
    with pytest.raises(CorruptCheckpointError):
        io.load_checkpoint(file)


def test_a_file_that_stock_lightning_wrote_over_ours_is_read(tmp_path: Path, caplog: Any) -> None:
    io = saved(tmp_path)
    io.teardown()
    other = {**STATE, "global_step": 9}
    torch.save(other, tmp_path / "new")
    os.replace(tmp_path / "new", tmp_path / "a.ckpt")
    assert same(io.load_checkpoint(tmp_path / "a.ckpt"), other)
    assert "replaced" in caplog.text
    # A copy that kept the bytes is verified as before.
    torch.save(STATE, tmp_path / "stock.ckpt")
    assert same(io.load_checkpoint(tmp_path / "stock.ckpt"), STATE)
    with pytest.raises(CheckpointNotFoundError):
        io.load_checkpoint(tmp_path / "none.ckpt")


@pytest.mark.parametrize("where", ["payload", "head", "padding", "id", "directory", "cut", "longer"])
def test_damage_is_found_in_a_copied_folder(tmp_path: Path, where: str) -> None:
    (tmp_path / "run").mkdir()
    saved(tmp_path / "run").teardown()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    file = tmp_path / "copy" / "a.ckpt"
    assert same(plugin().load_checkpoint(file), STATE)
    raw = file.read_bytes()
    if where in ("cut", "longer"):
        os.truncate(file, len(raw) + (1 if where == "longer" else -1))
    else:
        places = {"payload": 100_000, "head": 3, "padding": raw.index(b"ZZZZ")}
        flip(
            file,
            places.get(
                where, raw.rindex(b".data/serialization_id") - 100 if where == "id" else raw.rindex(b"PK\1\2") + 20
            ),
        )
    with pytest.raises(CorruptCheckpointError):
        plugin().load_checkpoint(file)


def test_no_flipped_bit_of_a_file_copied_without_its_folder_is_loaded(tmp_path: Path) -> None:
    """Its own checksums stand in for the manifest: each flip is an error, or in bytes that nobody reads."""
    state: dict[str, Any] = {"w": torch.arange(300.0), "step": 7}
    io = plugin()
    io.save_checkpoint(state, tmp_path / "a.ckpt")
    io.teardown()
    alone = tmp_path / "elsewhere" / "a.ckpt"
    alone.parent.mkdir()
    shutil.copy(tmp_path / "a.ckpt", alone)
    whole = alone.read_bytes()
    assert same(io.load_checkpoint(alone), state)
    payload = whole.index(state["w"].numpy().tobytes())
    num_found = 0
    for offset in {*range(0, len(whole), 7), *range(payload, payload + 1200, 50)}:
        flip(alone, offset)
        try:
            assert same(io.load_checkpoint(alone), state), offset
            assert not payload <= offset < payload + 1200
        except CorruptCheckpointError:
            num_found += 1
        alone.write_bytes(whole)
    assert num_found > 300
    for cut in (len(whole) - 1, len(whole) // 2, 10):
        alone.write_bytes(whole[:cut])
        with pytest.raises(CorruptCheckpointError):
            io.load_checkpoint(alone)
        with contextlib.suppress(Exception):
            plugin(verify="off").load_checkpoint(alone)


@pytest.mark.parametrize("over_ours", [True, False])
def test_a_damaged_file_that_stock_lightning_wrote_is_refused(tmp_path: Path, over_ours: bool) -> None:
    io = saved(tmp_path)
    io.teardown()
    file = tmp_path / ("a.ckpt" if over_ours else "b.ckpt")
    torch.save({**STATE, "global_step": 9}, file)
    flip(file, 100_000)
    with pytest.raises(CorruptCheckpointError, match="damaged in record"):
        io.load_checkpoint(file)


@pytest.mark.parametrize("kind", ["old format", "no crc"])
def test_a_file_without_checksums_is_read_with_a_warning(tmp_path: Path, caplog: Any, kind: str) -> None:
    torch.serialization.set_crc32_options(kind != "no crc")
    try:
        torch.save(STATE, tmp_path / "a.ckpt", _use_new_zipfile_serialization=kind != "old format")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(plugin().load_checkpoint(tmp_path / "a.ckpt"), STATE)
    assert "holds no checksums" in caplog.text


@pytest.mark.parametrize("verify", ["full", "off"])
def test_a_stock_file_is_in_memory_once_while_it_is_read(tmp_path: Path, verify: str) -> None:
    num_bytes = 128 << 20
    torch.save({"w": torch.ones(num_bytes // 4)}, tmp_path / "a.ckpt")
    script = f"""
import re, sys
from async_ckpt.integrations.lightning import AsyncCkptIO
from async_ckpt.integrations.lightning.single_file import CheckpointFile, load_file
from async_ckpt.storage.filesystem import FileSystem
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
before = peak()
state = load_file(FileSystem(), CheckpointFile(sys.argv[1]), verify={verify!r}, map_location=None, weights_only=True)
assert float(state["w"][-1]) == 1
print(peak() - before)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "a.ckpt")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert num_bytes // 2 < int(ended.stdout) < num_bytes * 3 // 2


@pytest.mark.parametrize("verify", ["full", "off"])
def test_a_file_that_zipfile_rewrote_is_read_as_torch_reads_it(tmp_path: Path, caplog: Any, verify: str) -> None:
    state = {**STATE, "object": Path("any")}
    torch.save(state, tmp_path / "stock")
    with zipfile.ZipFile(tmp_path / "stock") as stock, zipfile.ZipFile(tmp_path / "a.ckpt", "w") as rewritten:
        for record in stock.infolist():
            rewritten.writestr(record.filename, stock.read(record))
    found = plugin(verify=verify).load_checkpoint(tmp_path / "a.ckpt", weights_only=False)
    assert same(found, state)
    assert ("torch.load reads it unverified" in caplog.text) == (verify == "full")
    flip(tmp_path / "a.ckpt", 100_000)
    if verify == "full":
        with pytest.raises(CorruptCheckpointError, match="damaged in record"):
            plugin().load_checkpoint(tmp_path / "a.ckpt", weights_only=False)


@pytest.mark.parametrize("verify", ["full", "off"])
@pytest.mark.parametrize("kind", ["cut", "cut old format", "empty", "junk"])
def test_a_file_without_a_manifest_that_is_no_checkpoint_is_corrupt(tmp_path: Path, kind: str, verify: str) -> None:
    file = tmp_path / "a.ckpt"
    torch.save(STATE, file, _use_new_zipfile_serialization=kind != "cut old format")
    raw = {"empty": b"", "junk": b"hello world" * 100}.get(kind, file.read_bytes()[:400])
    file.write_bytes(raw)
    with pytest.raises(CorruptCheckpointError, match=r"a\.ckpt"):
        plugin(verify=verify).load_checkpoint(file, weights_only=True)


@pytest.mark.parametrize("verify", ["full", "off"])
def test_a_file_without_a_manifest_names_the_class_that_it_needs(tmp_path: Path, verify: str) -> None:
    torch.save({"state": {"bad": torch.nn.Linear(1, 1)}}, tmp_path / "a.ckpt")
    with pytest.raises(UnsupportedStateError, match=r"needs torch\.nn\..*\.Linear at state"):
        plugin(verify=verify).load_checkpoint(tmp_path / "a.ckpt", weights_only=True)


@pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
def test_a_folder_that_rsync_copied_is_verified(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    saved(tmp_path / "run").teardown()
    subprocess.run(["rsync", "-a", f"{tmp_path}/run/", f"{tmp_path}/copy"], check=True)
    assert same(plugin().load_checkpoint(tmp_path / "copy/a.ckpt"), STATE)
    flip(tmp_path / "copy/a.ckpt", 100_000)
    with pytest.raises(CorruptCheckpointError, match=r"a\.ckpt"):
        plugin().load_checkpoint(tmp_path / "copy/a.ckpt")


def test_load_waits_for_the_pending_save(tmp_path: Path) -> None:
    files = GatedFileSystem()
    io = plugin(filesystem=files)
    io.save_checkpoint(STATE, tmp_path / "a.ckpt")
    assert same(io.load_checkpoint(tmp_path / "a.ckpt"), STATE)
    files.fail_manifest = OSError(errno.EIO, "broken disk")
    io.save_checkpoint({**STATE, "global_step": 8}, tmp_path / "a.ckpt")
    with pytest.raises(CommitError, match="broken disk"):
        io.load_checkpoint(tmp_path / "a.ckpt")
    files.fail_manifest = None
    with pytest.raises(CommitError, match="broken disk"):
        io.save_checkpoint(STATE, tmp_path / "b.ckpt")
    assert same(torch.load(tmp_path / "a.ckpt"), STATE), "the old file stays whole"
    io.teardown()


def test_the_same_path_many_times_in_flight(tmp_path: Path) -> None:
    files = GatedFileSystem()
    io = plugin(filesystem=files)
    files.gate.clear()
    for n in range(4):
        io.save_checkpoint({**STATE, "global_step": n}, tmp_path / "a.ckpt")
        if n == 1:
            io.remove_checkpoint(tmp_path / "a.ckpt")
    files.gate.set()
    io.teardown()
    assert io.load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 3
    assert visible(tmp_path) == {"a.ckpt": "file"}


def test_several_folders_in_one_engine(tmp_path: Path) -> None:
    io = plugin()
    for folder in ("a", "b/c"):
        io.save_checkpoint({**STATE, "folder": folder}, tmp_path / folder / "last.ckpt")
    io.teardown()
    for folder in ("a", "b/c"):
        assert io.load_checkpoint(tmp_path / folder / "last.ckpt")["folder"] == folder


def test_a_pending_file_that_is_removed(tmp_path: Path) -> None:
    files = GatedFileSystem()
    io = plugin(filesystem=files)
    files.gate.clear()
    io.save_checkpoint(STATE, tmp_path / "a.ckpt")
    io.remove_checkpoint(tmp_path / "a.ckpt")
    io.remove_checkpoint(tmp_path / "never.ckpt")
    assert not io.is_pending(tmp_path / "a.ckpt")
    files.gate.set()
    io.teardown()
    assert visible(tmp_path) == {} and list((tmp_path / ".async_ckpt").iterdir()) == []


def test_a_file_that_cannot_be_deleted_ends_no_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = FaultyFileSystem()
    io = plugin(filesystem=files)
    io.save_checkpoint(STATE, tmp_path / "a.ckpt")
    files.fail_when(lambda op: op.name == "unlink" and "a.ckpt" in op.path, errno.EBUSY)
    io.remove_checkpoint(tmp_path / "a.ckpt")
    for name in ("b.ckpt", "c.ckpt"):
        io.save_checkpoint(STATE, tmp_path / name)
    io.load_checkpoint(tmp_path / "c.ckpt")
    assert len([record for record in caplog.records if "cannot be deleted" in record.message]) == 1
    files.heal()
    io.save_checkpoint(STATE, tmp_path / "d.ckpt")
    io.teardown()
    assert visible(tmp_path) == {"b.ckpt": "file", "c.ckpt": "file", "d.ckpt": "file"}


def test_a_crash_between_the_two_renames_is_finished_by_the_next_run(tmp_path: Path) -> None:
    saved(tmp_path).teardown()
    files = GatedFileSystem()
    files.fail_move = OSError(errno.EIO, "broken disk")
    io = plugin(filesystem=files)
    io.save_checkpoint({**STATE, "global_step": 8}, tmp_path / "a.ckpt")
    with pytest.raises(CommitError, match="could not be moved") as caught:
        io.teardown()
    assert caught.value.committed is None
    assert torch.load(tmp_path / "a.ckpt")["global_step"] == 7
    assert plugin().load_checkpoint(tmp_path / "a.ckpt")["global_step"] == 8
    # A file deleted by hand: the next run drops its manifest. A newer file of somebody else is not overwritten.
    saved(tmp_path, "b.ckpt").teardown()
    (tmp_path / "b.ckpt").unlink()
    io = plugin(filesystem=files)
    io.save_checkpoint(STATE, tmp_path / "a.ckpt")
    with pytest.raises(CommitError):
        io.teardown()
    torch.save({**STATE, "global_step": 99}, tmp_path / "a.ckpt")
    saved(tmp_path, "c.ckpt").teardown()
    assert torch.load(tmp_path / "a.ckpt")["global_step"] == 99
    assert sorted(p.name for p in (tmp_path / ".async_ckpt").iterdir()) == ["c.ckpt"]


def test_a_state_that_cannot_be_saved(tmp_path: Path) -> None:
    io = plugin()
    with pytest.raises(UnsupportedStateError):
        io.save_checkpoint({**STATE, "hook": lambda: None}, tmp_path / "a.ckpt")
    io.save_checkpoint(STATE, tmp_path / "a.ckpt")
    io.teardown()
    assert same(io.load_checkpoint(tmp_path / "a.ckpt"), STATE)


def test_what_is_refused(tmp_path: Path) -> None:
    for bad in ({"root": "x"}, {"retention": None}, {"staging_byte": 1}, {"staging_bytes": "1 GB"}):
        with pytest.raises(ConfigError):
            AsyncCkptIO(**bad)
    io = plugin()
    with pytest.raises(ConfigError, match="s3://"):
        io.save_checkpoint(STATE, "s3://bucket/a.ckpt")
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint(STATE, tmp_path / "a.ckpt", storage_options={})
    assert pickle.loads(pickle.dumps(io))._config == SMALL


class Modes(Observer):
    def __init__(self, modes: list[str]) -> None:
        self.modes = modes

    def on_save(self, metrics: Any) -> None:
        self.modes.append(metrics.mode)


@pytest.mark.parametrize("how", ["eager", "asked", "by_hand"])
def test_guarded_saves(tmp_path: Path, how: str) -> None:
    model = job()
    modes: list[str] = []
    io = plugin(observers=(Modes(modes),), guard=how == "asked")
    if how == "by_hand":
        model.on_fit_start = lambda: io.guard(*model.trainer.optimizers)  # type: ignore[method-assign]
    trainer(tmp_path, io, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=1)]).fit(
        model, data()
    )
    assert len(visible(tmp_path)) == 6 and ("lazy" in modes) == (how != "eager")
    steps = [torch.load(tmp_path / f"epoch=0-step={n}.ckpt", weights_only=False) for n in range(1, 7)]
    assert all(
        not same(a["state_dict"]["net.0.weight"], b["state_dict"]["net.0.weight"]) for a, b in itertools.pairwise(steps)
    )


def test_a_guard_is_refused_before_the_first_step_for_what_it_cannot_protect(tmp_path: Path) -> None:
    model = job()
    model.net.append(torch.nn.Embedding(2, 2, max_norm=1.0))
    with pytest.raises(ConfigError, match=r"Embedding.*guard=False"):
        trainer(tmp_path, plugin(guard=True), callbacks=[ModelCheckpoint(dirpath=tmp_path)]).fit(model, data())
    assert model.losses == [] and visible(tmp_path) == {}


def test_the_older_package_name_works_too(tmp_path: Path) -> None:
    old = pytest.importorskip("pytorch_lightning")

    class OldJob(old.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = (self.net(batch[0]) - batch[1]).square().mean()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    checkpoint = old.callbacks.ModelCheckpoint(
        dirpath=tmp_path, monitor="loss", save_top_k=-1, every_n_train_steps=1, filename="m"
    )
    old.Trainer(
        max_epochs=1,
        plugins=[plugin()],
        callbacks=[checkpoint],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    ).fit(OldJob(), data(3))
    assert sorted(visible(tmp_path)) == ["m-v1.ckpt", "m-v2.ckpt", "m.ckpt"]


def test_without_lightning_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning.fabric.plugins", "lightning_fabric.plugins"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'async-ckpt\[lightning\]'"):
        framework.checkpoint_io_class()


def test_this_is_the_version_that_was_tried() -> None:
    assert importlib.metadata.version("lightning").startswith("2.6."), (
        "run these tests with this version, then name it in the docstring"
    )
