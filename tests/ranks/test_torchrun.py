"""Under real torchrun: all ranks save at the same steps, resume from the same tag, stop together, and one of them
deletes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import Catalog, load

REPOSITORY = Path(__file__).parents[2]


def torchrun(
    tmp_path: Path, num_ranks: int, num_steps: int, interfere: Callable[[subprocess.Popen[str], list[int]], None] | None
) -> Any:
    """What each rank has learnt, and the launcher's exit code and output."""
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    for old in out.iterdir():
        old.unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    process = subprocess.Popen(
        [*launcher, "-m", "tests.ranks.torchrun_training", str(tmp_path / "root"), str(out), str(num_steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if interfere is not None:
        pids = [out / f"pid{rank}" for rank in range(num_ranks)]
        while not all(path.exists() and path.read_text() for path in pids):
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail(f"it ended too early: {process.communicate()[0]}")
        interfere(process, [int(path.read_text()) for path in pids])
    output, _ = process.communicate(timeout=150)
    results = [out / f"rank{rank}.json" for rank in range(num_ranks)]
    assert all(path.exists() for path in results), output
    return [json.loads(path.read_text()) for path in results], process.returncode, output


def check_last(tmp_path: Path, learnt: list[dict[str, Any]]) -> None:
    """All have stopped at the same step, and its state is committed."""
    (step,) = {one["stopped_at"] for one in learnt}
    catalog = Catalog(tmp_path / "root")
    assert catalog.latest() == f"last-{step}"
    assert {entry.path for entry in catalog.manifest(f"last-{step}").files} == {
        "train.pt",
        *(f"rank-{r}.pt" for r in range(len(learnt))),
    }
    assert load(tmp_path / "root" / f"last-{step}" / "train.pt")["step"] == step
    assert catalog.staging() == []
    assert all(one["ok"] and one["preempted"] for one in learnt)
    assert [one["after"] for one in learnt] == [[f"last-{step}"] * 2] * len(learnt)


@pytest.mark.wide
@pytest.mark.parametrize(
    "num_ranks", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)]
)
def test_all_ranks_save_at_the_same_steps_and_the_next_run_resumes_with_another_number(
    tmp_path: Path, num_ranks: int
) -> None:
    learnt, code, output = torchrun(tmp_path, num_ranks, 60, None)
    assert code == 0, output
    saved = learnt[0]["saved"]
    assert saved and [one["saved"] for one in learnt] == [saved] * num_ranks
    newest = f"step-{saved[-1]}"
    assert [one["after"] for one in learnt] == [[newest, newest]] * num_ranks
    assert [one["before"] for one in learnt] == [[None, None]] * num_ranks
    # Each checkpoint too many was deleted once, and by rank 0.
    assert [one["deleted"] for one in learnt] == [max(0, len(saved) - 2)] + [0] * (num_ranks - 1)
    catalog = Catalog(tmp_path / "root")
    assert len(catalog.tags()) == min(2, len(saved))
    files = {entry.path: entry.rank for entry in catalog.manifest(newest).files}
    assert files == {"train.pt": 0 if num_ranks > 1 else None} | {
        f"rank-{r}.pt": r if num_ranks > 1 else None for r in range(num_ranks)
    }
    assert all(catalog.verify(tag).ok for tag in catalog.tags()) and catalog.staging() == []
    again, code, output = torchrun(tmp_path, 2, 10, None)
    assert code == 0, output
    assert [one["before"] for one in again] == [[newest, newest]] * 2


@pytest.mark.wide
def test_sigterm_to_one_rank_stops_all_with_the_same_last_checkpoint(tmp_path: Path) -> None:
    learnt, code, output = torchrun(tmp_path, 2, 100_000, lambda process, pids: os.kill(pids[1], signal.SIGTERM))
    assert code == 0, output
    check_last(tmp_path, learnt)
    assert [one["signal"] for one in learnt] == ["another rank", "SIGTERM"]


@pytest.mark.wide
def test_sigterm_to_the_launcher_stops_all_with_the_same_last_checkpoint(tmp_path: Path) -> None:
    # torchrun passes it on to its workers, waits for them, and ends with an error of its own.
    learnt, _, _ = torchrun(tmp_path, 2, 100_000, lambda process, pids: process.send_signal(signal.SIGTERM))
    check_last(tmp_path, learnt)
    assert "SIGTERM" in [one["signal"] for one in learnt]
