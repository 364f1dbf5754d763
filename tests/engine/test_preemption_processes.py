"""Preemption of real processes by real signals: between steps, in save, in commit, in a C call, under torchrun."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from async_ckpt import Catalog, load

from .loader_training import NUM_STEPS

REPOSITORY = Path(__file__).parents[2]


def start(*arguments: object, command: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command, "-m", "tests.engine.preempted_training", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_until(process: subprocess.Popen[str], word: str, count: int = 1) -> None:
    seen = []
    for line in process.stdout:
        seen.append(line)
        count -= line.startswith(word)
        if count == 0:
            return
    pytest.fail(f"the process ended before it said {word!r}: {''.join(seen)}")


def check_root(root: Path, output: str) -> None:
    """Everything that is listed loads right, nothing is staged, and the last checkpoint is the state the process
    stopped in.
    """
    catalog = Catalog(root)
    for tag in catalog.tags():
        assert catalog.verify(tag).ok
    assert catalog.staging() == []
    step, digest = next(line.split()[2:4] for line in output.splitlines() if line.startswith("stopped at"))
    state = load(root / f"last-{step}" / "state.pt")
    assert state["step"] == int(step)
    assert hashlib.sha256(state["model"]["weight"].numpy().tobytes()).hexdigest() == digest


@pytest.mark.wide
@pytest.mark.parametrize(("where", "num_signals"), [("save", 2), ("commit", 2), ("c_call", 1), ("sleep", 2)])
def test_a_signal_anywhere_saves_the_last_state_and_ends_well(tmp_path, where, num_signals):
    process = start(tmp_path, where)
    read_until(process, "at")
    for _ in range(num_signals):
        process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    check_root(tmp_path / "rank-0", output)
    assert "LOG WARNING preempted (SIGTERM)" in output
    assert "committed: " in output
    assert "Traceback" not in output


@pytest.mark.wide
@pytest.mark.parametrize("chain", ["python", "ignore", "default"])
def test_the_handler_that_was_there_before_still_counts(tmp_path, chain):
    process = start(tmp_path, "step", f"chain={chain}")
    read_until(process, "at")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    check_root(tmp_path / "rank-0", output)
    assert output.count("earlier handler") == (chain == "python")


@pytest.mark.wide
@pytest.mark.leaves_staging
def test_a_disk_slower_than_the_deadline_is_told_and_loses_nothing_old(tmp_path):
    """Nothing can be published: the process still ends soon after its deadline, says what is lost, and fails."""
    process = start(tmp_path, "step", "slow", "deadline=1.5")
    read_until(process, "at")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "LOG ERROR preempted (SIGTERM)" in output
    assert "not finished in time (not visible): last-" in output
    assert process.returncode != 0
    assert Catalog(tmp_path / "rank-0").tags() == []


@pytest.mark.wide
def test_another_signal_does_what_it_always_did(tmp_path):
    process = start(tmp_path, "step")
    read_until(process, "at")
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGUSR1


@pytest.mark.wide
def test_exit_after_ends_a_loop_that_never_looks(tmp_path):
    process = start(tmp_path, "step", "exit")
    read_until(process, "at")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    (last,) = [tag for tag in Catalog(tmp_path / "rank-0").tags() if tag.startswith("last-")]
    assert Catalog(tmp_path / "rank-0").verify(last).ok


@pytest.mark.slow
@pytest.mark.leaves_staging
def test_sigkill_after_the_signal_leaves_old_or_new(tmp_path):
    process = start(tmp_path, "save")
    read_until(process, "at")
    process.send_signal(signal.SIGTERM)
    read_until(process, "LOG WARNING preempted")
    process.kill()
    process.communicate(timeout=60)
    catalog = Catalog(tmp_path / "rank-0")
    assert all(catalog.verify(tag).ok for tag in catalog.tags())


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_under_torchrun_a_signal_to_the_workers_themselves(tmp_path):
    """As a scheduler does that signals every process: all workers save and end well, and so does the launcher."""
    process = start(tmp_path, "save", command=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    workers = []
    for line in process.stdout:
        if line.startswith("at"):
            workers.append(int(line.split()[2]))
            if len(workers) == 2:
                break
    for pid in workers:
        os.kill(pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    for rank in range(2):
        assert [tag for tag in Catalog(tmp_path / f"rank-{rank}").tags() if tag.startswith("last-")], output
        assert Catalog(tmp_path / f"rank-{rank}").staging() == []


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_under_torchrun_every_worker_saves(tmp_path):
    """The launcher gets the signal, passes it on to its workers, and waits for them."""
    process = start(tmp_path, "save", command=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"))
    read_until(process, "at", count=2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    for rank in range(2):
        tags = Catalog(tmp_path / f"rank-{rank}").tags()
        assert [tag for tag in tags if tag.startswith("last-")], output
        assert Catalog(tmp_path / f"rank-{rank}").staging() == []
    assert output.count("LOG WARNING preempted (SIGTERM), ") == 2


@pytest.mark.wide
def test_a_loop_that_dies_of_its_workers_death_after_the_signal_still_saves(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.engine.loader_training", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        read_until(process, "at step", NUM_STEPS)
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    finally:
        process.kill()
    assert "dataloader.py" in output, "the loop did not die of its worker: " + output
    tag = f"last-{NUM_STEPS}"
    assert Catalog(tmp_path).tags() == [tag], output
    state = load(tmp_path / tag / "state.pt")
    assert state["step"] == NUM_STEPS
    assert int(state["optimizer"]["state"][0]["step"]) == NUM_STEPS
