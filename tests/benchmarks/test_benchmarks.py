"""The harness end to end on a tiny workload: that rows, reasons and reports are right; never how fast anything was."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import contenders, report, run, workloads
from benchmarks.contenders.base import Contender, tree_bytes
from benchmarks.limits import evict
from benchmarks.results import Row, spread, training_figures
from benchmarks.scenarios.common import ShortCheckpoint, check_complete
from benchmarks.watch import run_child
from benchmarks.workloads import flatten
from tests.support.processes import run_python

pytestmark = [pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"), pytest.mark.wide]


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    (file,) = folder.glob("*.jsonl")
    runs = [json.loads(line) for line in file.read_text().splitlines()]
    return {
        f"{r['scenario']}-{r['request']['workload']}-{r['request']['size_mib']}-{r['contender']}-r{r['repeat']}": r
        for r in runs
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of two contenders and an unknown one, as a person would start it."""
    out = tmp_path_factory.mktemp("results")
    names = "torch_save,thread_clone,no_such_writer"
    assert (
        run.main(
            f"--workload adamw --size-mib 2 --contenders {names} --repeats 1 --saves 2 --warmups 0 --out {out}".split()
        )
        == 0
    )
    return out


def test_every_contender_leaves_a_line_with_its_samples(saved: Path) -> None:
    results = results_of(saved)
    assert len(results) == 3
    for name in ("torch_save", "thread_clone"):
        result = results[f"save-adamw-2-{name}-r0"]
        assert result["status"] == "ok", result["reason"]
        assert len(result["samples"]) == 2
        for sample in [result["first"], *result["samples"]]:
            assert 0 < sample["stall_s"] <= sample["safe_s"] <= sample["saved_s"] <= sample["durable_s"]
            assert sample["disk_bytes"] >= sample["num_bytes"] > 1 << 20
        assert result["synced_by"] == "harness"
        assert result["config"]


def test_a_line_tells_where_its_numbers_come_from(saved: Path) -> None:
    result = results_of(saved)["save-adamw-2-torch_save-r0"]
    environment = result["environment"]
    assert environment["num_cores"] >= 1
    assert environment["memory_bytes"] > 0
    assert environment["kernel"]
    assert environment["file_system"]["fs_type"] != "unknown"
    assert environment["versions"]["torch"]
    assert result["command_line"].startswith("python -m benchmarks.run --workload adamw")
    assert result["workload"]["num_tensors"] > 100
    assert result["seed"] == 0


def test_a_missing_contender_is_a_row_with_its_reason(saved: Path, tmp_path: Path) -> None:
    result = results_of(saved)["save-adamw-2-no_such_writer-r0"]
    assert result["status"] == "missing"
    assert "no_such_writer" in result["reason"]
    assert report.main([str(saved), "--out", str(tmp_path), "--no-plots"]) == 0
    row = next(
        line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| no_such_writer")
    )
    assert "missing: unknown contender" in row


def test_scratch_files_are_gone_after_a_run(saved: Path) -> None:
    assert [path.name for path in saved.iterdir() if path.suffix != ".jsonl"] == []


def test_the_report_renders_tables_and_plots(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert report.main([str(saved), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    assert "| torch_save |" in text
    assert "| thread_clone |" in text
    assert "## Machine" in text
    assert capsys.readouterr().out.strip() == text.strip()
    assert (tmp_path / "durable_throughput-adamw-2.png").read_bytes().startswith(b"\x89PNG")
    assert "durable_throughput-adamw-2.png" in text


def test_an_empty_folder_is_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "no results" in capsys.readouterr().err


def test_the_training_scenario_alternates_and_saves(tmp_path: Path) -> None:
    arguments = (
        "--scenario training --workload adamw --size-mib 2 --contenders thread_clone --repeats 1 --steps "
        "4 --every 2 --segments 2"
    )
    assert run.main([*arguments.split(), "--tokens", "8", "--out", str(tmp_path)]) == 0
    (result,) = results_of(tmp_path).values()
    assert result["status"] == "ok", result["reason"]
    assert [segment["with_checkpoints"] for segment in result["segments"]] == [False, True, True, False]
    assert [segment["num_checkpoints"] for segment in result["segments"]] == [0, 2, 2, 0]
    assert all(len(segment["step_s"]) == 4 for segment in result["segments"])


def test_orders_turn_round_in_every_second_repeat() -> None:
    names = list("abcdef")
    first, second, third = (run.order_of(names, repeat, seed=1) for repeat in range(3))
    assert sorted(first) == names
    assert second == first[::-1]
    assert third not in (first, second)


def test_a_child_that_hangs_or_dies_is_a_row(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import threading; threading.Event().wait()"]
    hung = run_child(command, timeout_s=0.2, sample_memory=False, environment=dict(os.environ), log=tmp_path / "log")
    assert run.explain(hung, 0.2)["status"] == "timeout"
    command = [sys.executable, "-c", "import os; print('last words', flush=True); os._exit(3)"]
    died = run_child(command, timeout_s=30, sample_memory=False, environment=dict(os.environ), log=tmp_path / "log")
    row = run.explain(died, 30)
    assert row["status"] == "killed"
    assert "exit code 3: last words" in row["reason"]


class Truncating(Contender):
    """Says it saved, and wrote four bytes."""

    def save(self, step: int, state: dict[str, Any]) -> None:
        self.produced(step).write_bytes(b"lies")


def test_a_short_checkpoint_is_no_fast_row(tmp_path: Path) -> None:
    workload = workloads.build("small", 2)
    contender = Truncating()
    contender.setup(tmp_path, workload)
    with pytest.raises(ShortCheckpoint, match="does not exist"):
        check_complete(contender, workload, 0)
    contender.save(0, workload.state())
    with pytest.raises(ShortCheckpoint, match=r"4 of \d+ bytes"):
        check_complete(contender, workload, 0)
    contender.discard(0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["transformer", "adamw", "many", "small"])
def test_workloads_have_their_size_and_change_in_place(name: str) -> None:
    workload = workloads.build(name, 32)
    assert workload.num_bytes == pytest.approx(32 << 20, rel=0.15)
    before, _ = flatten(workload.state())
    copies = {key: tensor.clone() for key, tensor in before.items()}
    workload.advance()
    after, _ = flatten(workload.state())
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)
    assert not any(bool((after[key] == copies[key]).all()) for key in after)
    counts = {
        "transformer": range(250, 350),
        "adamw": range(1000, 1400),
        "many": range(10_000, 10_001),
        "small": range(150, 300),
    }
    assert len(workload.tensors) in counts[name]


def test_the_same_seed_gives_the_same_state() -> None:
    one, _ = flatten(workloads.build("small", 2, seed=3).state())
    two, _ = flatten(workloads.build("small", 2, seed=3).state())
    other, _ = flatten(workloads.build("small", 2, seed=4).state())
    assert all(bool((one[key] == two[key]).all()) for key in one)
    assert any(not bool((one[key] == other[key]).all()) for key in one)


def test_every_registered_module_is_there() -> None:
    folder = Path(contenders.__file__).parent
    assert {entry.module for entry in contenders.REGISTRY.values()} == {p.stem for p in folder.glob("*.py")} - {
        "__init__",
        "base",
    }


def test_eviction_leaves_nothing_cached_where_the_file_system_has_a_disk(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(os.urandom(1 << 20))
    assert tree_bytes(path) == 1 << 20
    assert 0.0 <= evict(path) <= 1.0


def test_medians_keep_their_spread_and_bad_runs_stay_out() -> None:
    ok = {"status": "ok", "reason": "", "samples": [{"stall_s": 1.0}, {"stall_s": 5.0}, {"stall_s": 2.0}]}
    bad = {"status": "failed", "reason": "disk full", "samples": [{"stall_s": 99.0}]}
    row = Row("x", [ok, bad])
    figure = row.samples("stall_s")
    assert figure is not None
    assert (figure.median, figure.low, figure.high, figure.num) == (2.0, 1.0, 5.0, 3)
    assert row.reason() == "1 of 2 runs failed: disk full"
    assert spread([None]) is None


def test_slowdown_is_with_over_without() -> None:
    def segment(with_checkpoints: bool, wall_s: float, drain_s: float) -> dict[str, Any]:
        return {
            "with_checkpoints": with_checkpoints,
            "wall_s": wall_s,
            "drain_s": drain_s,
            "num_checkpoints": 3,
            "stall_s": [0.1],
        }

    figures = training_figures({"segments": [segment(False, 10.0, 0.0), segment(True, 13.0, 3.0)]})
    assert figures["slowdown"] == pytest.approx(1.3)
    assert figures["per_checkpoint_s"] == pytest.approx(1.0)
    assert figures["drained_per_checkpoint_s"] == pytest.approx(2.0)


def test_the_hot_path_keeps_to_its_threads_and_hand_overs(tmp_path):
    found = json.loads(run_python("-m", "benchmarks.hot_path", "--directory", tmp_path).stdout)
    assert 1 <= found["threads"] <= 21
    assert 0 < found["hand_overs_per_chunk"] <= 3
    assert 10 < found["classes"] <= 45 and 50 < found["functions"] <= 250
