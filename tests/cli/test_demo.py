"""The main job: the demo trains, is killed at random moments, and resumes bit-identically."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import Catalog

# Deterministic sums need the same number of threads in every run.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
RUN = """
import sys
from async_ckpt.cli.demo.training import DemoConfig, train
root, log, steps = sys.argv[1:]
train(DemoConfig(root=root, num_steps=int(steps), save_every=3, batch_size=4, loss_log=log, corpus_bytes=200_000,
                 num_layers=2, width=64, context_length=32),
      on_step=lambda record: print(record.step, flush=True))
print("finished", flush=True)
"""


def start(root: Path, log: Path, steps: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-W", "error", "-c", RUN, str(root), str(log), str(steps)]
    return subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)


def last_losses(log: Path) -> dict[int, str]:
    """The loss of each step as it was computed last."""
    return {int(step): loss for step, loss in (line.split() for line in log.read_text().splitlines())}


def wait_for_steps(process: subprocess.Popen[str], count: int) -> None:
    """Until that many steps were made: progress, not time, decides when to kill."""
    assert process.stdout is not None
    for _ in range(count):
        assert process.stdout.readline().strip().isdigit()


@pytest.mark.wide
def test_killed_and_resumed_training_is_bit_identical(tmp_path: Path) -> None:
    steps = 36
    whole = start(tmp_path / "whole", tmp_path / "whole.log", steps)
    assert whole.communicate(timeout=240)[0].endswith("finished\n")
    chance = random.Random(7)
    log = tmp_path / "killed.log"
    for _ in range(3):
        process = start(tmp_path / "killed", log, steps)
        wait_for_steps(process, chance.randint(4, 11))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        # Whatever the moment: every visible tag is whole.
        for tag in Catalog(tmp_path / "killed").tags():
            Catalog(tmp_path / "killed").verify(tag).raise_if_bad()
    last = start(tmp_path / "killed", log, steps)
    assert last.communicate(timeout=240)[0].endswith("finished\n")
    resumed = last_losses(log)
    assert len(log.read_text().splitlines()) > steps, "no step was ever repeated: the kills missed"
    assert resumed == last_losses(tmp_path / "whole.log")


@pytest.fixture
def default_algorithms() -> Iterator[None]:
    """The demo asks torch for deterministic algorithms, for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.wide
@pytest.mark.usefixtures("default_algorithms")
def test_report_shows_stall_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from async_ckpt.cli.demo import plot_steps, summary
    from async_ckpt.cli.demo.training import DemoConfig, train

    small: Any = {"batch_size": 2, "corpus_bytes": 100_000, "num_layers": 1, "width": 32, "context_length": 16}
    result = train(DemoConfig(root=str(tmp_path / "r"), num_steps=8, save_every=2, **small))
    figures = dict(summary(result))
    assert figures["steps, saves"] == "8, 4"
    assert "ms (max" in figures["stall per save (create + save + commit)"]
    assert figures["durable throughput"].endswith("B/s")
    plot_steps(result.steps, str(tmp_path / "steps.png"))
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert [s.saved for s in result.steps] == [False, True] * 4
