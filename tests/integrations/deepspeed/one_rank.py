"""Scenarios for one rank, each against real DeepSpeed. A scenario is right when it returns."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

from async_ckpt import Catalog, CheckpointError, CommitError, ConfigError, KeepLast, Observer, OutOfSpaceError, Tolerate
from async_ckpt.integrations.deepspeed import AsyncDeepSpeedEngine, attach
from async_ckpt.metrics import SaveMetrics
from tests.integrations.deepspeed.world import (
    GatedFileSystem,
    RecordingFileSystem,
    differences,
    make,
    make_pipeline,
    state_of,
    train,
    train_pipeline,
)
from tests.support.faulty_filesystem import FaultyFileSystem
from tests.support.insides import commits_of, thread_of

SMALL: dict[str, Any] = {"staging_bytes": 32 << 20}


def load_stock(directory: Path, stage: int, dtype: str, tag: str | None = None) -> tuple[Any, dict[str, Any]]:
    """A fresh engine with DeepSpeed's own checkpoint engine, after loading; asserts that something was loaded."""
    engine = make(stage, dtype, seed=99)
    assert isinstance(engine.checkpoint_engine, TorchCheckpointEngine)
    path, client_state = engine.load_checkpoint(str(directory), tag=tag)
    assert path is not None, "load_checkpoint found nothing"
    return engine, client_state


def load_copy(directory: Path, stage: int, dtype: str) -> Any:
    """As `load_stock`, of what is there now: `torch.load` would wait for what is on its way to the place itself."""
    copy = directory.with_name(f"{directory.name}-copy")
    shutil.copytree(directory, copy)
    return load_stock(copy, stage, dtype)[0]


def roundtrip(directory: Path, stage: str, dtype: str) -> None:
    """Training goes on while the files are held back; what is loaded later, here or by stock DeepSpeed, is the state at
    the save. Of DeepSpeed's own objects, which it loads with weights_only=False, nobody is warned.
    """
    filesystem = GatedFileSystem()
    engine = make(int(stage), dtype)
    attach(engine, directory, filesystem=filesystem, **SMALL)
    train(engine, 2)
    expected = state_of(engine)
    client_state: dict[str, Any] = {"epoch": 7, "history": [1.5, {"x": torch.arange(4)}]}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert engine.save_checkpoint(str(directory), client_state=client_state) is True
    assert not [str(warning.message) for warning in caught if "load refuses" in str(warning.message)]
    client_state["history"].append("changed after the save")
    assert not (directory / "latest").exists() and not (directory / "global_step2").exists()
    train(engine, 3)
    assert not (directory / "latest").exists()
    assert differences(expected, state_of(engine)), "training changed nothing, so the test shows nothing"
    filesystem.gate.set()
    stock_first(engine, directory, int(stage), dtype, expected)
    again = make(int(stage), dtype, seed=5)
    attach(again, directory, **SMALL)
    path, found = again.load_checkpoint(str(directory))
    assert path is not None and found["epoch"] == 7 and found["history"][0] == 1.5 and len(found["history"]) == 2
    assert differences(expected, state_of(again)) == []
    train(again, 1)
    again.destroy()
    assert Catalog(directory).verify("global_step2").ok


def stock_first(engine: Any, directory: Path, stage: int, dtype: str, expected: dict[str, Any]) -> None:
    """Wait until everything is on disk, then load it into stock DeepSpeed."""
    engine.destroy()
    assert (directory / "latest").read_text() == "global_step2"
    stock, found = load_stock(directory, stage, dtype)
    assert found["epoch"] == 7
    assert differences(expected, state_of(stock)) == []
    train(stock, 1)


def overlap_spans_steps(directory: Path) -> None:
    """`get_commit_info` says None for as long as the checkpoint is not durable, then names it once; `latest` comes with
    it.
    """
    filesystem = GatedFileSystem()
    engine = make(2)
    checkpointer = attach(engine, directory, filesystem=filesystem, **SMALL)
    assert isinstance(checkpointer, CheckpointEngine) and checkpointer.is_decoupled()
    train(engine, 1)
    engine.save_checkpoint(str(directory), tag="a")
    for _ in range(20):
        train(engine, 1)
        assert checkpointer.get_commit_info() is None
    assert os.listdir(directory / "a") if (directory / "a").exists() else True
    assert not (directory / "latest").exists()
    filesystem.gate.set()
    checkpointer.drain()
    assert (directory / "latest").read_text() == "a"
    info = checkpointer.get_commit_info()
    assert info == CheckpointCommitInfo(tag="a", save_dir=str(directory), save_latest=False)
    assert checkpointer.commit(info) is True
    assert checkpointer.get_commit_info() is None
    engine.destroy()


def save_then_load(directory: Path) -> None:
    """`load_checkpoint` straight after `save_checkpoint` loads that save."""
    engine = make(1)
    attach(engine, directory, **SMALL)
    train(engine, 1)
    expected = state_of(engine)
    engine.save_checkpoint(str(directory))
    path, _ = engine.load_checkpoint(str(directory))
    assert path is not None and "global_step1" in path
    assert differences(expected, state_of(engine)) == []
    train(engine, 1)
    for folder in (directory, directory, directory / "other"):
        engine.save_checkpoint(str(folder))
        assert os.access(folder / "zero_to_fp32.py", os.X_OK)
        (folder / "zero_to_fp32.py").unlink()
    engine.destroy()
    assert (directory / "latest").read_text() == "global_step2"


def same_tag_again(directory: Path) -> None:
    """The old checkpoint stays whole until the new one takes its place."""
    filesystem = GatedFileSystem(is_open=True)
    engine = make(2)
    checkpointer = attach(engine, directory, filesystem=filesystem, **SMALL)
    train(engine, 1)
    first = state_of(engine)
    engine.save_checkpoint(str(directory), tag="best")
    checkpointer.drain()
    train(engine, 1)
    second = state_of(engine)
    filesystem.gate.clear()
    engine.save_checkpoint(str(directory), tag="best")
    assert Catalog(directory).verify("best").ok
    assert differences(first, state_of(load_copy(directory, 2, "fp32"))) == []
    filesystem.gate.set()
    engine.save_checkpoint(str(directory), tag="best")
    engine.destroy()
    assert differences(second, state_of(load_stock(directory, 2, "fp32")[0])) == []


def paths_and_tags(directory: Path) -> None:
    """A save_dir of another type, tags with "/", another save_dir than the one announced, and none announced at all."""

    class LocalPath:
        def __fspath__(self) -> str:
            return str(directory / "local")

    engine = make(1)
    attach(engine, **SMALL)
    train(engine, 1)
    expected = state_of(engine)
    for save_dir, tag in (
        (directory / "pathlib", None),
        (LocalPath(), "a"),
        (str(directory / "deep"), "epoch1/step 5"),
        ("relative", "r"),
    ):
        before = os.getcwd()
        os.chdir(directory)
        try:
            engine.save_checkpoint(save_dir, tag=tag)
        finally:
            os.chdir(before)
    engine.checkpoint_engine.drain()
    for name, tag in (("pathlib", "global_step1"), ("local", "a"), ("deep", "epoch1/step 5"), ("relative", "r")):
        assert (directory / name / "latest").read_text() == tag
        assert differences(expected, state_of(load_stock(directory / name, 1, "fp32")[0])) == []
        folder = (directory / name / tag).parent
        assert Catalog(folder).verify(os.path.basename(tag)).ok
    for tag in ("../escape", "..", "."):
        with pytest.raises(CheckpointError, match="leaves the save_dir"):
            engine.save_checkpoint(str(directory / "deep"), tag=tag)
    for tag in ("manifest.json", "Manifest.JSON/5", "a/MANIFEST.json/b"):
        with pytest.raises(CheckpointError, match=r"'manifest\.json' is a checkpoint's own"):
            engine.save_checkpoint(str(directory / "deep"), tag=tag)
    assert not (directory / "escape").exists() and not (directory / "deep" / "a").exists()
    engine.destroy()


def sixteen_bit_model(directory: Path) -> None:
    """The export goes to its own path, and harms no checkpoint that has the same tag."""
    filesystem = GatedFileSystem()
    engine = make(2, "bf16")
    attach(engine, directory, filesystem=filesystem, **SMALL)
    train(engine, 1)
    expected = state_of(engine)
    engine.save_checkpoint(str(directory))
    assert engine.save_16bit_model(str(directory)) is True
    assert engine.save_16bit_model(str(directory / "elsewhere"), "weights.bin") is True
    for path in (directory / "pytorch_model.bin", directory / "elsewhere" / "weights.bin"):
        exported = torch.load(path, weights_only=True)
        assert {name: exported[name] for name in expected["model"]}.keys() == expected["model"].keys()
        assert all(torch.equal(exported[name], tensor) for name, tensor in expected["model"].items())
    filesystem.gate.set()
    engine.destroy()
    assert (directory / "latest").read_text() == "global_step1"
    assert differences(expected, state_of(load_stock(directory, 2, "bf16")[0])) == []
    assert sorted(p.name for p in (directory / "elsewhere").iterdir()) == ["weights.bin"]


def files_of_other_code(directory: Path) -> None:
    """What the training script writes into the tag's folder right after the save stays there, beside the checkpoint."""
    filesystem = GatedFileSystem()
    engine = make(2)
    attach(engine, directory, filesystem=filesystem, **SMALL)
    train(engine, 1)
    expected = state_of(engine)
    engine.save_checkpoint(str(directory), tag="t")
    (directory / "t" / "tokenizer").mkdir(parents=True)
    (directory / "t" / "tokenizer" / "vocab.txt").write_text("words")
    filesystem.gate.set()
    engine.destroy()
    assert (directory / "t" / "tokenizer" / "vocab.txt").read_text() == "words"
    assert Catalog(directory).verify("t").ok
    assert differences(expected, state_of(load_stock(directory, 2, "fp32", tag="t")[0])) == []


def offloaded_tensors(directory: Path) -> None:
    """What DeepSpeed copies into the final folder, past the engine, becomes part of the checkpoint."""
    engine = make(1)
    checkpointer = attach(engine, directory, **SMALL)
    train(engine, 1)
    swapped = directory / "swap"
    (swapped / "optimizer").mkdir(parents=True)
    (swapped / "optimizer" / "0.tensor.swp").write_bytes(b"moments" * 1000)
    save_zero = engine._save_zero_checkpoint

    def save_and_copy(save_dir: str, tag: str) -> None:
        save_zero(save_dir, tag)
        shutil.copytree(swapped, os.path.join(save_dir, tag, "offloaded_tensors", "rank00"))

    engine._save_zero_checkpoint = save_and_copy
    for _ in range(2):
        train(engine, 1)
        engine.save_checkpoint(str(directory))
    engine.destroy()
    for tag in ("global_step2", "global_step3"):
        copied = directory / tag / "offloaded_tensors" / "rank00" / "optimizer" / "0.tensor.swp"
        assert copied.read_bytes() == b"moments" * 1000
        assert Catalog(directory).verify(tag).ok
        assert "offloaded_tensors/rank00/optimizer/0.tensor.swp" in {
            entry.path for entry in Catalog(directory).manifest(tag).files
        }
    load_stock(directory, 1, "fp32")
    assert checkpointer.pending() == []


def folder_of_stock_deepspeed(directory: Path) -> None:
    """Stock checkpoints are loaded, and a tag of theirs is replaced as a whole."""
    stock = make(2)
    train(stock, 1)
    first = state_of(stock)
    stock.save_checkpoint(str(directory), tag="t", client_state={"epoch": 1})
    filesystem = GatedFileSystem()
    engine = make(2, seed=3)
    attach(engine, directory, filesystem=filesystem, **SMALL)
    path, found = engine.load_checkpoint(str(directory))
    assert path is not None and found["epoch"] == 1
    assert differences(first, state_of(engine)) == []
    train(engine, 1)
    second = state_of(engine)
    engine.save_checkpoint(str(directory), tag="t")
    assert differences(first, state_of(load_copy(directory, 2, "fp32"))) == []
    filesystem.gate.set()
    engine.destroy()
    assert differences(second, state_of(load_stock(directory, 2, "fp32")[0])) == []
    assert Catalog(directory).verify("t").ok


def disk_full(directory: Path) -> None:
    """The failure raises at the next step; `latest` and the older checkpoint stay; the next save works."""
    filesystem = GatedFileSystem(is_open=True)
    engine = make(1)
    # What did not change would be a link.
    checkpointer = attach(engine, directory, filesystem=filesystem, reuse="off", **SMALL)
    train(engine, 1)
    expected = state_of(engine)
    engine.save_checkpoint(str(directory), tag="good")
    checkpointer.drain()
    calls = {
        "step": lambda: train(engine, 2),
        "save": lambda: engine.save_checkpoint(str(directory), tag="never"),
        "load": lambda: engine.load_checkpoint(str(directory)),
        "destroy": engine.destroy,
    }
    for when, call in calls.items():
        filesystem.gate.clear()
        filesystem.error = OutOfSpaceError("no room for this one; the file is incomplete")
        engine.save_checkpoint(str(directory), tag=f"bad-{when}")
        filesystem.gate.set()
        for pending in checkpointer.pending():
            pending.wait(60)
        with pytest.raises(OutOfSpaceError, match="no room"):
            call()
        assert (directory / "latest").read_text() == "good"
        assert sorted(p.name for p in directory.iterdir() if p.is_dir()) == ["good"]
    assert differences(expected, state_of(load_stock(directory, 1, "fp32")[0])) == []


def tolerated(directory: Path) -> None:
    """A failed checkpoint lets training go on, and `latest` stays; the second in a row raises at the next step."""
    filesystem = FaultyFileSystem()
    filesystem.fail_when(lambda op: op.name == "fsync" and ".bad" in op.path, errno.EIO)
    engine = make(1)
    tolerate = Tolerate(consecutive=2)
    checkpointer = attach(engine, directory, filesystem=filesystem, on_commit_failure=tolerate, **SMALL)
    for tag in ("good", "bad1", "better", "bad2", "bad3"):
        train(engine, 1)
        engine.save_checkpoint(str(directory), tag=tag)
        for pending in checkpointer.pending():
            pending.wait(60)
        assert (directory / "latest").read_text() == ("good" if tag in ("good", "bad1") else "better")
    with pytest.raises(CommitError, match=r"2 checkpoints in a row.*'bad2'.*'bad3'"):
        train(engine, 2)
    assert engine.load_checkpoint(str(directory))[0] is not None
    engine.destroy()


def dead_writer(directory: Path) -> None:
    """Whoever saves with a dead writer is told at once; what was saved before stays, and `latest` names it."""
    engine = make(0, "fp32")
    checkpointer = attach(engine, directory, **SMALL)
    train(engine, 1)
    engine.save_checkpoint(str(directory), tag="before")
    checkpointer.drain()
    assert checkpointer.engine is not None
    writer = thread_of(commits_of(checkpointer.engine).pool)
    writer.loop.call_soon_threadsafe(writer.loop.stop)
    writer.join(60)
    train(engine, 1)
    with pytest.raises(CheckpointError, match="died"):
        engine.save_checkpoint(str(directory), tag="after")
    assert (directory / "latest").read_text() == "before" and not (directory / "after").exists()
    assert Catalog(directory).verify("before").ok


def exception_in_save(directory: Path) -> None:
    """A save that raises half way leaves nothing, and the next one is whole."""
    engine = make(1)
    checkpointer = attach(engine, directory, **SMALL)
    train(engine, 1)
    save_zero = engine._save_zero_checkpoint

    def interrupted(save_dir: str, tag: str) -> None:
        raise KeyboardInterrupt

    engine._save_zero_checkpoint = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.save_checkpoint(str(directory))
    with pytest.raises(CheckpointError, match="bad"):
        engine.save_checkpoint(str(directory), client_state={"bad": lambda: None})
    checkpointer.drain()
    assert sorted(p.name for p in directory.iterdir()) == []
    engine._save_zero_checkpoint = save_zero
    expected = state_of(engine)
    engine.save_checkpoint(str(directory))
    engine.destroy()
    assert differences(expected, state_of(load_stock(directory, 1, "fp32")[0])) == []


def latest_is_last_and_atomic(directory: Path) -> None:
    """Rename, sync of the root, then `latest` beside itself, renamed and synced; an older save never takes it back."""
    filesystem = RecordingFileSystem()
    engine = make(0)
    checkpointer = attach(engine, directory, filesystem=filesystem, **SMALL)
    train(engine, 1)
    engine.save_checkpoint(str(directory), tag="a")
    checkpointer.drain()
    published = filesystem.calls.index(("rename_noreplace", str(directory / "a")))
    assert filesystem.calls[published : published + 5] == [
        ("rename_noreplace", str(directory / "a")),
        ("fsync_dir", str(directory)),
        ("create_file", str(directory / ".latest.new")),
        ("rename", str(directory / "latest")),
        ("fsync_dir", str(directory)),
    ]
    engine.save_checkpoint(str(directory), tag="b", save_latest=False)
    checkpointer.drain()
    assert (directory / "latest").read_text() == "a" and Catalog(directory).tags() == ["a", "b"]
    train(engine, 2)
    assert (directory / "latest").read_text() == "a", "DeepSpeed itself wrote latest"
    engine.destroy()


def retention(directory: Path) -> None:
    """What `latest` names is never deleted."""
    engine = make(0)
    checkpointer = attach(engine, directory, retention=KeepLast(1), **SMALL)
    for number in range(6):
        train(engine, 1)
        engine.save_checkpoint(str(directory), tag=f"step{number}", save_latest=number < 3)
        checkpointer.drain()
    engine.destroy()
    assert (directory / "latest").read_text() == "step2" and Catalog(directory).tags() == ["step2", "step5"]


def zero_to_fp32(directory: Path, stage: str) -> None:
    """DeepSpeed's own tool, the copy that lies in the save_dir, finds all weights."""
    dtype = "bf16" if stage == "3" else "fp32"
    engine = make(int(stage), dtype)
    attach(engine, directory, **SMALL)
    train(engine, 2)
    expected = state_of(engine)["model"]
    engine.save_checkpoint(str(directory))
    engine.destroy()
    spec = importlib.util.spec_from_file_location("zero_to_fp32", directory / "zero_to_fp32.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    found = tool.get_fp32_state_dict_from_zero_checkpoint(str(directory))
    assert expected.keys() <= found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), name


def pipeline(directory: Path) -> None:
    """No step() is ever called: the checkpoint is committed all the same, and loads."""
    engine = make_pipeline(num_stages=1)
    checkpointer = attach(engine, directory, **SMALL)
    train_pipeline(engine, 2)
    expected = state_of(engine)
    engine.save_checkpoint(str(directory))
    train_pipeline(engine, 2)
    for pending in checkpointer.pending():
        assert pending.result(60)
    assert (directory / "latest").read_text() == "global_step2"
    again = make_pipeline(num_stages=1, seed=9)
    path, _ = again.load_checkpoint(str(directory))
    assert path is not None
    assert differences(expected, state_of(again)) == []
    engine.load_checkpoint(str(directory))
    assert differences(expected, state_of(engine)) == []
    engine.destroy()


def views_are_compacted(directory: Path) -> None:
    """A file holds the bytes that its tensors cover, tied tensors once, and not the flat buffers they are cut from."""
    checkpointer = AsyncDeepSpeedEngine(save_dir=directory, **SMALL)
    flat = torch.arange(1_000_000, dtype=torch.float32)
    part = flat[1000:2000].view(10, 100)
    state = {
        "weight": part,
        "tied": part,
        "other": flat[5000:5010],
        "size": torch.Size([3, 4]),
        "grad": (flat[:4].requires_grad_() * 2),
    }
    info = CheckpointCommitInfo(tag="t", save_dir=directory, save_latest=False)
    checkpointer.create(info)
    checkpointer.makedirs(str(directory / "t"), exist_ok=True)
    path = str(directory / "t" / "layer_00-model_00-model_states.pt")
    checkpointer.save(state_dict=state, path=path)
    checkpointer.commit(info)
    assert os.path.getsize(path) < 20_000
    found = torch.load(path, weights_only=False)
    assert isinstance(found["size"], torch.Size)
    assert torch.equal(found["weight"], part) and torch.equal(found["other"], torch.arange(5000.0, 5010.0))
    assert found["weight"].data_ptr() == found["tied"].data_ptr()
    for map_location in (None, "cpu", torch.device("cpu"), lambda storage, location: storage):
        assert torch.equal(checkpointer.load(path, map_location=map_location)["weight"], part)
    assert not (directory / "latest").exists()
    checkpointer.cleanup()


def without_attach(directory: Path) -> None:
    """Assigned by hand it is a blocking engine, right without any help."""
    engine = make(1)
    engine.checkpoint_engine = AsyncDeepSpeedEngine(save_dir=directory, **SMALL)
    train(engine, 1)
    expected = state_of(engine)
    engine.save_checkpoint(str(directory))
    assert (directory / "latest").read_text() == "global_step1"
    path, _ = engine.load_checkpoint(str(directory))
    assert path is not None
    assert differences(expected, state_of(engine)) == []
    engine.checkpoint_engine.cleanup()


def plain_use(directory: Path) -> None:
    """The signature before CheckpointCommitInfo: bare tags."""
    checkpointer = AsyncDeepSpeedEngine(directory, **SMALL)
    checkpointer.create("t")
    checkpointer.save({"x": torch.ones(3)}, str(directory / "t" / "x.pt"))
    assert checkpointer.commit("t") is True
    assert torch.equal(checkpointer.load(str(directory / "t" / "x.pt"))["x"], torch.ones(3))
    assert (directory / "latest").read_text() == "t"
    checkpointer.cleanup()
    checkpointer.cleanup()
    for wrong in ({"root": "x"}, {"overwrite": "refuse"}, {"stagging_bytes": 1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            AsyncDeepSpeedEngine(directory, **wrong)
    with pytest.raises(ConfigError, match="Linear"):
        attach(torch.nn.Linear(1, 1), directory)


class Modes(Observer):
    """Notes how each file was copied."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def on_save(self, metrics: SaveMetrics) -> None:
        self.seen.add(metrics.mode)


def guarded(directory: Path) -> None:
    """With guard=True the optimizer's tensors are copied behind the next step, and hold the state at the save all the
    same.
    """
    for stage, dtype in ((0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32")):
        own = directory / f"{stage}-{dtype}"
        engine = make(stage, dtype)
        modes = Modes()
        attach(engine, own, guard=True, observers=(modes,), **SMALL)
        train(engine, 2)
        expected = state_of(engine)
        engine.save_checkpoint(str(own))
        train(engine, 3)
        engine.destroy()
        assert differences(expected, state_of(load_stock(own, stage, dtype)[0])) == []
        assert "lazy" in modes.seen, f"nothing was copied lazily at stage {stage}: {modes.seen}"


def saved_for_exit(directory: Path) -> None:
    """Save, and let the process end: no step, no destroy. `loaded_after_exit` looks at the result from a new
    process.
    """
    engine = make(2)
    attach(engine, directory.parent / "exit", **SMALL)
    train(engine, 1)
    torch.save(state_of(engine), directory.parent / "expected.pt")
    engine.save_checkpoint(str(directory.parent / "exit"))
    KEPT.append(engine)


def loaded_after_exit(directory: Path) -> None:
    expected = torch.load(directory.parent / "expected.pt", weights_only=False)
    assert (directory.parent / "exit" / "latest").read_text() == "global_step1"
    engine, _ = load_stock(directory.parent / "exit", 2, "fp32")
    assert differences(expected, state_of(engine)) == []
    again = make(2, seed=4)
    attach(again, directory.parent / "exit", **SMALL)
    path, _ = again.load_checkpoint(str(directory.parent / "exit"))
    assert path is not None
    assert differences(expected, state_of(again)) == []
    again.destroy()


KEPT: list[Any] = []
