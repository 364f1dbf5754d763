"""`Trainer` with the mixin: the same files as stock, exact resume, nothing partial, loud failures."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ...support.comparing import flip, same

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer, TrainerCallback  # noqa: E402
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

from async_ckpt import Catalog, CommitError, ConfigError, CorruptCheckpointError, Observer, Tolerate  # noqa: E402
from async_ckpt.integrations.frameworks import require  # noqa: E402
from async_ckpt.integrations.huggingface import (  # noqa: E402
    AsyncCheckpointTrainerMixin,
    attach,
    last_committed_checkpoint,
)
from async_ckpt.integrations.huggingface.saver import SaveTotalLimit  # noqa: E402
from async_ckpt.retention import CheckpointInfo, decide  # noqa: E402
from async_ckpt.storage.filesystem import FileSystem  # noqa: E402
from tests.support.faulty_filesystem import FaultyFileSystem  # noqa: E402
from tests.support.processes import free_port  # noqa: E402

from .jobs import SMALL, HoldingFileSystem, StopAt, losses, model, rows, trainer  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.wide]

REPOSITORY = Path(__file__).parents[3]


def names(output_dir: Path) -> list[str]:
    return sorted((p.name for p in output_dir.glob("checkpoint-*")), key=lambda name: int(name.split("-")[1]))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Eight steps without interruption, saved by stock Trainer."""
    folder = tmp_path_factory.mktemp("stock")
    trained = trainer(folder, asynchronous=False)
    trained.train()
    return trained, folder


@pytest.mark.parametrize("guard", [True, False])
def test_the_same_checkpoints_as_stock(tmp_path: Path, stock: Any, guard: bool) -> None:
    _, expected = stock
    trained = trainer(tmp_path, guard=guard)
    trained.train()
    assert losses(trained) == losses(stock[0])
    assert names(tmp_path) == names(expected) == [f"checkpoint-{n}" for n in (2, 4, 6, 8)]
    for name in names(expected):
        ours, theirs = tmp_path / name, expected / name
        assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()} | {"manifest.json"}
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            a, b = (torch.load(where / file, weights_only=False) for where in (ours, theirs))
            assert same(a, b), f"{name}/{file}"
        for file in ("trainer_state.json", "config.json", "tokenizer.json", "generation_config.json"):
            assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text()), file
        assert torch.load(ours / "training_args.bin", weights_only=False).learning_rate == 0.01
    assert all(Catalog(tmp_path).verify(tag).ok for tag in Catalog(tmp_path).tags())
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-8")
    assert same(dict(loaded.state_dict()), dict(trained.model.state_dict()))
    assert PreTrainedTokenizerFast.from_pretrained(tmp_path / "checkpoint-8").convert_tokens_to_ids("w7") == 7


def test_a_guard_is_refused_before_the_first_step_for_what_it_cannot_protect(tmp_path: Path) -> None:
    net = model()
    net.transformer.wte.max_norm = 1.0
    guarded = trainer(tmp_path, guard=True, model=net)
    with pytest.raises(ConfigError, match=r"Embedding.max_norm=1. .*wte.*guard=False"):
        guarded.train()
    assert guarded.state.global_step == 0 and names(tmp_path) == []
    trainer(tmp_path, model=net).train()
    assert Catalog(tmp_path).verify("checkpoint-8").ok


@pytest.mark.parametrize("back_in", ["ours", "stock"])
def test_resume_is_exact(tmp_path: Path, stock: Any, back_in: str) -> None:
    trainer(tmp_path, callbacks=[StopAt(4)]).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    second = trainer(tmp_path, asynchronous=back_in == "ours")
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(stock[0]) and second.state.global_step == 8
    assert same(dict(second.model.state_dict()), dict(stock[0].model.state_dict()))
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]


class Modes(Observer):
    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    def on_save(self, metrics: Any) -> None:
        self.seen.add((metrics.path, metrics.mode))


@pytest.mark.parametrize("guard", [True, False])
def test_a_guard_is_there_only_where_it_was_asked_for(tmp_path: Path, guard: bool) -> None:
    modes = Modes()
    trainer(tmp_path, max_steps=2, guard=guard, config={"observers": (modes,)}).train()
    assert ("optimizer.pt", "lazy" if guard else "eager") in modes.seen


class ScheduleFree(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_an_optimizer_that_a_guard_cannot_protect_is_named_before_the_first_step(tmp_path: Path) -> None:
    trained = trainer(tmp_path, guard=True)
    trained.optimizer = ScheduleFree(trained.model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"ScheduleFree.*guard=False"):
        trained.train()
    assert trained.state.global_step == 0 and names(tmp_path) == []
    again = trainer(tmp_path, max_steps=2)
    again.optimizer = ScheduleFree(again.model.parameters(), lr=0.1)
    again.train()
    assert names(tmp_path) == ["checkpoint-2"]


@pytest.mark.leaves_staging
def test_kill_9_in_the_middle_of_a_save(tmp_path: Path, stock: Any) -> None:
    """The process dies while checkpoint-6 is being written: it is as if the save had never begun."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.integrations.huggingface.jobs", str(tmp_path), "6"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        # The training prints too, from another thread: the word may stand within one of its lines.
        assert any("reached" in line for line in process.stdout)
        process.send_signal(signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    assert "checkpoint-6" not in names(tmp_path) and "checkpoint-4" in names(tmp_path)
    assert list(tmp_path.glob(".staging.checkpoint-6.*")), "it was in the middle of the save"
    last = last_committed_checkpoint(tmp_path)
    assert last == str(tmp_path / names(tmp_path)[-1]) and last == get_last_checkpoint(str(tmp_path))
    second = trainer(tmp_path)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(stock[0])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert list(tmp_path.glob(".staging.*")) == [], "the next run has swept what the dead one left"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_ranks(tmp_path: Path) -> None:
    """Every rank adds its random state to the one directory, and all resume exactly."""
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.integrations.huggingface.jobs", str(tmp_path), "ranks"]
    ranks = []
    for rank in ("0", "1"):
        environment = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank}
        ranks.append(
            subprocess.Popen(
                command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        outputs = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    for rank, (out, err) in enumerate(outputs):
        assert f"rank {rank} of 2: equal" in out, err[-3000:]
    assert names(tmp_path / "whole") == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    assert names(tmp_path / "parts") == ["checkpoint-6", "checkpoint-8"]
    manifest = Catalog(tmp_path / "parts").manifest("checkpoint-8")
    assert {entry.path: entry.rank for entry in manifest.files if entry.path.startswith("rng_state")} == {
        "rng_state_0.pth": 0,
        "rng_state_1.pth": 1,
    }


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, stock: Any) -> None:
    held, seen = HoldingFileSystem("checkpoint-2"), {}

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[state.global_step] = names(tmp_path)
            if state.global_step == 6:
                held.gate.set()

        def on_checkpoint_committed(self, args: Any, state: Any, control: Any, checkpoint: str, **kwargs: Any) -> None:
            assert os.path.exists(f"{checkpoint}/model.safetensors")
            seen.setdefault("committed", []).append(Path(checkpoint).name)

    trained = trainer(tmp_path, callbacks=[Watch()], config={"filesystem": held})
    trained.train()
    assert seen[2] == [] and "checkpoint-2" not in seen[6]
    assert seen["committed"] == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    # Written long after the step, and still the state at the save.
    assert same(
        load_file(tmp_path / "checkpoint-2/model.safetensors"), load_file(stock[1] / "checkpoint-2/model.safetensors")
    )
    assert losses(trained) == losses(stock[0])


class Fixed(Trainer):
    """Evaluations with known losses: step 4 is the best."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        output = super().evaluation_loop(*args, **kwargs)
        output.metrics["eval_loss"] = abs(self.state.global_step - 4.0)
        return output


@pytest.mark.parametrize("limit", [1, 2, 3, None])
def test_save_total_limit_and_the_best_model(tmp_path: Path, limit: int | None) -> None:
    found = {}
    for asynchronous in (False, True):
        folder = tmp_path / str(asynchronous)
        options: dict[str, Any] = {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
            "metric_for_best_model": "loss",
        }
        trained = trainer(
            folder, asynchronous=asynchronous, kind=Fixed, max_steps=10, save_total_limit=limit, **options
        )
        trained.train()
        assert same(
            {k: v for k, v in trained.model.state_dict().items() if k != "lm_head.weight"},
            {
                k: load_file(folder / "checkpoint-4/model.safetensors")[k]
                for k in trained.model.state_dict()
                if k != "lm_head.weight"
            },
        )
        states = {name: json.loads((folder / name / "trainer_state.json").read_text()) for name in names(folder)}
        best = {
            name: state["best_model_checkpoint"] and Path(state["best_model_checkpoint"]).relative_to(folder)
            for name, state in states.items()
        }
        found[asynchronous] = (names(folder), best)
    assert found[True] == found[False]


def test_the_limit_is_a_pure_decision() -> None:
    def kept(num: int, *tags: str, best: str | None = None) -> list[str]:
        infos = [CheckpointInfo(tag, n, {"best_model_checkpoint": best} if best else {}) for n, tag in enumerate(tags)]
        return [d.tag for d in decide(infos, SaveTotalLimit(num), now_unix_ns=0) if d.keep]

    assert kept(2, "checkpoint-2", "checkpoint-4", "checkpoint-6") == ["checkpoint-4", "checkpoint-6"]
    assert kept(1, "checkpoint-2", "checkpoint-4", best="checkpoint-2") == ["checkpoint-2", "checkpoint-4"]
    assert kept(2, "checkpoint-2", "checkpoint-4", "checkpoint-6", best="checkpoint-2") == [
        "checkpoint-2",
        "checkpoint-6",
    ]
    assert kept(1, "checkpoint-2", "mine", "checkpoint-4", best="checkpoint-9") == ["mine", "checkpoint-4"]
    with pytest.raises(ConfigError):
        SaveTotalLimit(0)


class Failing(FileSystem):
    """Takes no small file whose path holds `part`."""

    def __init__(self, part: str, code: int, told: str) -> None:
        super().__init__()
        self.part, self.error = part, OSError(code, told)

    def create_file(self, path: str, data: bytes) -> None:
        if self.part in path:
            raise self.error
        super().create_file(path, data)


def test_a_failed_commit_stops_training_and_keeps_the_old_one(tmp_path: Path) -> None:
    failing = Failing(".staging.checkpoint-4.", errno.EIO, "broken disk")
    trained = trainer(tmp_path, max_steps=200, config={"filesystem": failing}, save_total_limit=1)
    with pytest.raises(CommitError, match="broken disk"):
        trained.train()
    assert trained.state.global_step < 200
    assert "checkpoint-4" not in names(tmp_path) and last_committed_checkpoint(tmp_path) is not None


def test_a_tolerated_failure_lets_training_go_on(tmp_path: Path) -> None:
    fs = FaultyFileSystem()
    fs.fail_when(lambda op: op.name == "fsync" and ".checkpoint-4." in op.path, errno.EIO)
    config = {"filesystem": fs, "on_commit_failure": Tolerate(consecutive=2)}
    trained = trainer(tmp_path, config=config)
    trained.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]
    fs.fail_when(lambda op: op.name == "fsync" and ".checkpoint-" in op.path, errno.EIO)
    with pytest.raises(CommitError, match=r"2 checkpoints in a row.*'checkpoint-2'.*'checkpoint-4'"):
        trainer(tmp_path / "b", config=config).train()


def test_a_failed_last_commit_is_raised_by_train(tmp_path: Path) -> None:
    failing = Failing(".staging.checkpoint-8.", errno.ENOSPC, "no space left")
    trained = trainer(tmp_path, config={"filesystem": failing})
    with pytest.raises(OSError, match="no space left"):
        trained.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert names(tmp_path)[-1] == "checkpoint-8"


def test_the_users_own_exception_is_not_replaced(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyError("the user's")

    failing = Failing(".staging.checkpoint", errno.EIO, "broken disk")
    with pytest.raises(KeyError, match="the user's"):
        trainer(tmp_path, callbacks=[Stop()], config={"filesystem": failing}).train()


def test_damaged_and_foreign_checkpoints_are_not_resumed_from(tmp_path: Path, stock: Any, caplog: Any) -> None:
    trainer(tmp_path).train()
    flip(tmp_path / "checkpoint-8/optimizer.pt", 1000)
    (tmp_path / "checkpoint-6/model.safetensors").unlink()
    (tmp_path / "checkpoint-4/notes.txt").write_text("an extra file harms nothing")
    (tmp_path / "checkpoint-100").mkdir()
    assert last_committed_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    assert "checkpoint-8" in caplog.text and "checkpoint-100" in caplog.text
    with pytest.raises(CorruptCheckpointError, match=r"optimizer\.pt"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    second = trainer(tmp_path)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(stock[0])
    for name in names(tmp_path)[:-1]:
        flip(tmp_path / name / "trainer_state.json", 5)
    with pytest.raises(CorruptCheckpointError):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_callback_adds_files_to_a_checkpoint_that_is_on_its_way(tmp_path: Path) -> None:
    """As those that save an adapter's weights do, wherever they find the checkpoint's folder."""
    held = HoldingFileSystem("checkpoint-2")

    class Adds(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder = tmp_path / f"checkpoint-{state.global_step}/adapter_model"
            folder.mkdir(parents=True)
            (folder / "adapter.bin").write_bytes(b"weights")
            held.gate.set()

    trainer(tmp_path, callbacks=[Adds(), StopAt(4)], config={"filesystem": held}).train()
    for name in ("checkpoint-2", "checkpoint-4"):
        assert (tmp_path / name / "adapter_model/adapter.bin").read_bytes() == b"weights"
        assert Catalog(tmp_path).verify(name).ok and (tmp_path / name / "model.safetensors").exists()


def test_a_commit_that_is_pending_is_named_to_who_asks_for_the_last(tmp_path: Path, caplog: Any) -> None:
    held, found = HoldingFileSystem("checkpoint-2"), []

    class Ask(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(last_committed_checkpoint(tmp_path))
            held.gate.set()

    trainer(tmp_path, callbacks=[Ask(), StopAt(2)], config={"filesystem": held}).train()
    assert found[0] is None and "the commit of 'checkpoint-2'" in caplog.text


def test_a_directory_of_stock_trainer_is_taken_where_nothing_else_is(tmp_path: Path, stock: Any) -> None:
    assert last_committed_checkpoint(tmp_path / "none") is None
    with pytest.raises((ValueError, FileNotFoundError)):
        trainer(tmp_path / "empty").train(resume_from_checkpoint=True)
    shutil.copytree(stock[1] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-6").mkdir()
    assert last_committed_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-6").rmdir()
    second = trainer(tmp_path)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(stock[0])


def test_a_class_of_ones_own(tmp_path: Path, stock: Any) -> None:
    class Mine(AsyncCheckpointTrainerMixin, Trainer):  # type: ignore[misc]
        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            torch.save({"mine": torch.arange(3)}, os.path.join(str(output_dir), "mine.pt"))
            Path(str(output_dir), "sub").mkdir()
            Path(str(output_dir), "sub", "mine.txt").write_text("mine")

    template = trainer(tmp_path / "unused", asynchronous=False)
    template.args.output_dir = str(tmp_path / "out")
    trained = Mine(model(), template.args, train_dataset=rows(), async_ckpt=SMALL)
    trained.train()
    assert losses(trained) == losses(stock[0])
    last = tmp_path / "out/checkpoint-8"
    assert torch.load(last / "mine.pt")["mine"].tolist() == [0, 1, 2] and (last / "sub/mine.txt").read_text() == "mine"
    formats = {entry.path: entry.format for entry in Catalog(tmp_path / "out").manifest("checkpoint-8").files}
    assert (
        formats["model.safetensors"] == "safetensors"
        and formats["optimizer.pt"] == "torch"
        and formats["config.json"] == "opaque"
    )


def test_pushes_wait_for_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr(
        Trainer,
        "_push_from_checkpoint",
        lambda self, folder: pushed.append((Path(folder).name, os.path.exists(f"{folder}/model.safetensors"))),
    )
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    trained = trainer(tmp_path)
    trained.args.push_to_hub = True
    trained.train()
    assert pushed == [(name, True) for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8")]


def test_just_in_time_markers_give_way(tmp_path: Path) -> None:
    trained = trainer(tmp_path)
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2/checkpoint-is-incomplete.txt").write_text("")
    trained.train()
    assert (tmp_path / "checkpoint-2/manifest.json").exists()


def test_a_relative_directory_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained = trainer(Path("out"), max_steps=2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    trained.train()
    assert names(tmp_path / "out") == ["checkpoint-2"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_what_is_refused(tmp_path: Path) -> None:
    stock_trainer = trainer(tmp_path, asynchronous=False)
    for bad in ({"root": "x"}, {"overwrite": "refuse"}, {"staging_byte": 1}):
        with pytest.raises(ConfigError):
            attach(stock_trainer, **bad)
    assert type(stock_trainer) is Trainer
    attach(stock_trainer)
    with pytest.raises(ConfigError, match="not attached yet"):
        attach(stock_trainer)
    with pytest.raises(ConfigError):
        attach(object())


FOREIGN = [".gitattributes", "notes (1).txt", "größe.txt", ".cache/x"]


class Untidy(Trainer):
    """Leaves files of other tools in its checkpoints."""

    def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        for name in FOREIGN:
            path = Path(output_dir, name)
            path.parent.mkdir(exist_ok=True)
            path.write_text(name)


def test_files_of_other_tools_are_carried(tmp_path: Path) -> None:
    trainer(tmp_path, kind=Untidy, max_steps=2).train()
    assert all((tmp_path / "checkpoint-2" / name).read_text() == name for name in FOREIGN)
    assert Catalog(tmp_path).verify("checkpoint-2").ok
    assert last_committed_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


class Careless(Trainer):
    """Saves an object of its own beside the model."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        assert output_dir is not None
        torch.save({"since": Path("x")}, Path(output_dir, "extra.pt"))


def test_of_what_transformers_loads_in_its_own_way_nobody_is_warned(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(tmp_path, kind=Careless, max_steps=2).train()
    told = [str(warning.message) for warning in caught if "load refuses" in str(warning.message)]
    assert len(told) == 1 and told[0].startswith("extra.pt holds") and "state['since']" in told[0]
    formats = {file.path: file.format for file in Catalog(tmp_path).manifest("checkpoint-2").files}
    assert formats["training_args.bin"] == formats["rng_state.pth"] == formats["extra.pt"] == "torch"


def test_checkpoints_of_stock_trainer_that_training_will_come_to(tmp_path: Path, stock: Any) -> None:
    run = tmp_path / "run"
    shutil.copytree(stock[1], run)
    (run / "checkpoint-6" / "trainer_state.json").unlink()
    again = trainer(run)
    with pytest.raises(ConfigError, match=r"checkpoint-6.*move or delete"):
        again.train()
    assert again.state.global_step == 0
    shutil.rmtree(run / "checkpoint-6")
    trainer(run, callbacks=[StopAt(3)]).train()
    # Step 2 was replaced, steps 4 and 8 would have been.
    assert (
        sorted(Catalog(run).tags()) == ["checkpoint-2", "checkpoint-4", "checkpoint-8"]
        and Catalog(run).verify("checkpoint-8").ok
    )
    assert last_committed_checkpoint(run) == str(run / "checkpoint-2"), "the newest that this package saved"
    resumed = trainer(run)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed)[8] == losses(stock[0])[8]


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_is_no_folder_where_training_will_come_to(tmp_path: Path, stock: Any, kind: str) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    if kind == "file":
        (run / "checkpoint-6").write_text("")
    else:
        (run / "checkpoint-6").symlink_to(elsewhere)
    if kind == "link":
        shutil.copytree(stock[1] / "checkpoint-6", elsewhere)
    training = trainer(run)
    with pytest.raises(ConfigError, match=r"checkpoint-6.*is a link or a file.*move or delete"):
        training.train()
    assert training.state.global_step == 0
    assert last_committed_checkpoint(run) == (str(run / "checkpoint-6") if kind == "link" else None)


def test_the_exchange_of_functions_ends(tmp_path: Path) -> None:
    import safetensors.torch
    import transformers.modeling_utils as user

    before = (torch.save, safetensors.torch.save_file, user.safe_save_file)
    trainer(tmp_path, max_steps=2).train()
    assert (torch.save, safetensors.torch.save_file, user.safe_save_file) == before


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("transformers", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pip install 'async-ckpt\[huggingface\]'"):
            require("huggingface", name)
    with pytest.raises(ImportError, match="transformers"):
        attach(object())


def test_these_are_the_versions_that_were_tried() -> None:
    found = {name: importlib.metadata.version(name).split(".")[0] for name in ("transformers", "accelerate")}
    assert found == {"transformers": "5", "accelerate": "1"}, (
        "run these tests with these versions, then name them in the docstring"
    )
