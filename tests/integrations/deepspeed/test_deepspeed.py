"""The DeepSpeed integration against real DeepSpeed on CPU, one and two ranks.

The processes start slowly, so one of them runs many scenarios; each scenario is a test here. The full matrix is marked
slow: ``pytest tests/integrations/deepspeed -m slow``.

What DeepSpeed's own engines get wrong, and the scenario that shows it right here: `latest` before the data: slow_rank ·
torn BatchNorm statistics, non-leaf tensors, files that do not load, names that are not found, no decoupled engine
without data_parallel: roundtrip · the last save before exit is lost: saved_for_exit · a dead writer is silent:
dead_writer · never committed by step: overlap_spans_steps · pipelines never commit: pipeline · overwritten in place:
latest_is_last_and_atomic, same_tag_again · no checksum, no retention: retention.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from async_ckpt.integrations.deepspeed import AsyncDeepSpeedEngine
from tests.integrations.deepspeed.job import finish, run_job, start
from tests.support.processes import run_ranks

pytestmark = pytest.mark.wide

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: pip install 'async-ckpt[deepspeed]'", allow_module_level=True)

Outcomes = Callable[[int, tuple[str, ...]], dict[str, str | None]]

ONE_RANK = (
    "roundtrip:0,fp32",
    "roundtrip:1,bf16",
    "roundtrip:2,fp32",
    "roundtrip:3,bf16",
    "overlap_spans_steps",
    "save_then_load",
    "read_at_once",
    "torch_load_at_once",
    "torch_load_of_a_failure",
    "torch_load_behind_a_commit",
    "without_overlap",
    "same_tag_again",
    "paths_and_tags",
    "sixteen_bit_model",
    "files_of_other_code",
    "offloaded_tensors",
    "folder_of_stock_deepspeed",
    "disk_full",
    "tolerated",
    "dead_writer",
    "exception_in_save",
    "latest_is_last_and_atomic",
    "retention",
    "zero_to_fp32:2",
    "zero_to_fp32:3",
    "pipeline",
    "views_are_compacted",
    "without_attach",
    "plain_use",
    "guarded",
    "guarded_bytes:0,fp32",
    "guarded_bytes:2,fp32",
    "guarded_bytes:3,bf16",
    "guard_refusals",
    "experts",
    "universal:2",
    "offloaded:2,cpu",
    "saved_for_exit",
)
AFTER_ONE_RANK = ("loaded_after_exit",)
TWO_RANKS = (
    "ranks_roundtrip:1,bf16",
    "ranks_roundtrip:2,fp32",
    "ranks_roundtrip:3,fp32",
    "slow_rank",
    "tags_of_their_own",
    "failing_rank",
    "ranks_tolerated",
    "bad_state_on_one_rank",
    "ranks_same_tag",
    "ranks_folder_that_cannot_be_replaced",
    "ranks_pipeline",
    "ranks_node_local",
    "ranks_saved_for_exit",
)
AFTER_TWO_RANKS = ("ranks_loaded_after_exit",)
MATRIX = tuple(f"{stage},{dtype}" for stage in range(4) for dtype in ("fp32", "bf16"))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Runs a group of scenarios once; the second group of a pair sees the files of the first."""
    directories: dict[int, Path] = {}

    @cache
    def run(world_size: int, scenarios: tuple[str, ...]) -> dict[str, str | None]:
        directory = directories.setdefault(world_size, tmp_path_factory.mktemp(f"ranks{world_size}"))
        return run_job(directory, world_size, list(scenarios))

    return run


@pytest.mark.timeout(700)
@pytest.mark.parametrize("scenario", ONE_RANK)
def test_one_rank(outcomes: Outcomes, scenario: str) -> None:
    assert outcomes(1, ONE_RANK)[scenario] is None


@pytest.mark.timeout(700)
@pytest.mark.parametrize("scenario", AFTER_ONE_RANK)
def test_after_the_process_has_ended(outcomes: Outcomes, scenario: str) -> None:
    assert outcomes(1, ONE_RANK)["saved_for_exit"] is None
    assert outcomes(1, AFTER_ONE_RANK)[scenario] is None


@pytest.mark.timeout(700)
@pytest.mark.parametrize("scenario", TWO_RANKS)
def test_two_ranks(outcomes: Outcomes, scenario: str) -> None:
    assert outcomes(2, TWO_RANKS)[scenario] is None


@pytest.mark.timeout(700)
@pytest.mark.parametrize("scenario", AFTER_TWO_RANKS)
def test_after_both_processes_have_ended(outcomes: Outcomes, scenario: str) -> None:
    assert outcomes(2, TWO_RANKS)["ranks_saved_for_exit"] is None
    assert outcomes(2, AFTER_TWO_RANKS)[scenario] is None


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world_size", [1, 2])
def test_full_matrix(tmp_path: Path, world_size: int) -> None:
    function = "roundtrip" if world_size == 1 else "ranks_roundtrip"
    found = run_job(tmp_path, world_size, [f"{function}:{arguments}" for arguments in MATRIX], timeout_s=500)
    assert found == dict.fromkeys(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_more_of_deepspeed(tmp_path: Path) -> None:
    """Guarded copies over hundreds of steps, all stages; universal checkpoints; optimizers on the CPU."""
    scenarios = [f"guarded_bytes:{arguments},100" for arguments in MATRIX]
    scenarios += [f"universal:{stage}" for stage in (1, 3)] + [f"offloaded:{stage},cpu" for stage in (1, 3)]
    found = run_job(tmp_path, 1, scenarios, timeout_s=800)
    assert found == dict.fromkeys(found)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    not Path("/usr/include/libaio.h").exists(), reason="DeepSpeed's extension for NVMe needs libaio-dev to be compiled"
)
def test_an_optimizer_swapped_to_files(tmp_path: Path) -> None:
    assert run_job(tmp_path, 1, ["offloaded:3,nvme"], timeout_s=800) == {"offloaded:3,nvme": None}


@pytest.mark.slow
@pytest.mark.leaves_staging
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("num_changes", [1, 7, 20])
def test_all_ranks_killed_in_the_middle_of_saves(tmp_path: Path, world_size: int, num_changes: int) -> None:
    """SIGKILL after so many changes of the directory: `latest` names a whole checkpoint, which loads; saving goes
    on.
    """
    own = tmp_path / "killed"
    processes = start(
        tmp_path, world_size, ["-m", "tests.integrations.deepspeed.worker", str(tmp_path), "saves_until_killed"]
    )
    deadline, seen, changes = time.monotonic() + 300, set[str](), 0
    while (
        changes < num_changes and all(process.poll() is None for process in processes) and time.monotonic() < deadline
    ):
        found = set(os.listdir(own)) if (own / "latest").exists() else seen
        changes += len(found ^ seen)
        seen = found
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes, 60)
    assert changes >= num_changes, (tmp_path / "log-0").read_text()[-3000:]
    again = run_job(tmp_path, world_size, ["loads_what_latest_names"])
    assert again == {"loads_what_latest_names": None}


@pytest.mark.slow
@pytest.mark.leaves_staging
@pytest.mark.timeout(600)
def test_a_killed_rank(tmp_path: Path) -> None:
    """SIGKILL while its file is being written: the other rank's next call raises, nothing is visible, the old one
    loads.
    """
    processes = start(tmp_path, 2, ["-m", "tests.integrations.deepspeed.worker", str(tmp_path), "killed_rank"])
    finish(processes, 300)
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode == 0, (tmp_path / "log-0").read_text()[-3000:]
    assert '"killed_rank": null' in (tmp_path / "outcomes-0.json").read_text()


def save_after_one_rank_was_alone(rank: int, folder: str) -> bool:
    distributed.destroy_process_group()
    if rank == 0:
        AsyncDeepSpeedEngine(save_dir=f"{folder}/alone").cleanup()
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    engine = AsyncDeepSpeedEngine(save_dir=f"{folder}/all", rank_timeout_s=10.0, backpressure_timeout_s=10.0)
    engine.create("a")
    engine.save({"rank": rank}, f"{folder}/all/a/{rank}.pt")
    done = engine.commit("a")
    engine.cleanup()
    return done


def test_ranks_meet_where_one_of_them_has_had_an_engine_alone(tmp_path: Path) -> None:
    assert run_ranks(tmp_path / "p", 2, save_after_one_rank_was_alone, str(tmp_path)) == [True, True]


def test_without_deepspeed_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from async_ckpt.integrations.deepspeed import AsyncDeepSpeedEngine, attach

    assert AsyncDeepSpeedEngine is not None
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"pip install 'async-ckpt\[deepspeed\]'"):
        attach(torch.nn.Linear(1, 1))


def test_an_old_deepspeed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import ModuleType

    from async_ckpt.integrations.deepspeed import attach

    class OldEngine:
        create = save = load = commit = makedirs = None

    modules: dict[str, Any] = {}
    for name in (
        "deepspeed",
        "deepspeed.runtime",
        "deepspeed.runtime.checkpoint_engine",
        "deepspeed.runtime.checkpoint_engine.checkpoint_engine",
    ):
        modules[name] = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])
    modules["deepspeed"].__version__ = "0.9.0"
    modules["deepspeed.runtime.checkpoint_engine.checkpoint_engine"].CheckpointEngine = OldEngine
    with pytest.raises(ImportError, match=r"deepspeed 0\.9\.0 is too old.*is_decoupled.*async-ckpt\[deepspeed\]"):
        attach(torch.nn.Linear(1, 1))


def test_this_is_the_version_that_was_tried() -> None:
    assert importlib.metadata.version("deepspeed").startswith("0.19."), (
        "try the slow matrix with this version, then name it"
    )
