"""The recipes of the README, run as they stand there: trained, stopped, resumed, the sharded one with another number of
ranks.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from async_ckpt import Catalog, load
from tests.support.processes import context, free_port

pytestmark = pytest.mark.wide

HERE = Path(__file__).parent
TAGS = [f"step-{step}" for step in (9, 19, 29, 39, 49, 59)]


def _run_rank(folder: str, recipe: str, rank: int, world_size: int, port: int) -> None:
    os.chdir(folder)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    runpy.run_path(str(HERE / recipe), run_name="__main__")


def run(folder: Path, recipe: str, world_size: int) -> None:
    """As torchrun would start it, without importing torch anew in every rank."""
    port = free_port()
    ranks = [
        context.Process(target=_run_rank, args=(str(folder), recipe, rank, world_size, port))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
        if process.exitcode is None:
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * world_size


def torchrun(folder: Path, recipe: str, world_size: int) -> None:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world_size}",
        str(HERE / recipe),
    ]
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parent.parent),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]


def assert_trained(folder: Path, tags: list[str], ranks: set[int | None]) -> None:
    catalog = Catalog(folder / "checkpoints")
    assert catalog.tags() == tags
    assert all(catalog.verify(tag).ok for tag in tags)
    assert {entry.rank for entry in catalog.manifest(tags[-1]).files} == ranks


def test_a_signal_to_the_whole_process_group(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(HERE / "preempted.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(HERE.parent.parent), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert any(line.startswith("step 20") for line in process.stdout)
        os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    (tag,) = Catalog(tmp_path / "checkpoints").tags()
    state = load(tmp_path / "checkpoints" / tag / "train.pt")
    assert tag == f"step-{state['step']}" and int(state["optimizer"]["state"][0]["step"]) == state["step"] >= 20


def test_single_device(tmp_path: Path) -> None:
    run(tmp_path, "single.py", 1)
    run(tmp_path, "single.py", 1)
    assert_trained(tmp_path, TAGS, {None})


@pytest.mark.timeout(300)
def test_ddp_under_torchrun(tmp_path: Path) -> None:
    torchrun(tmp_path, "ddp.py", 2)
    run(tmp_path, "ddp.py", 2)
    assert_trained(tmp_path, TAGS, {None, 0, 1})


def test_fsdp2_resumes_with_fewer_ranks(tmp_path: Path) -> None:
    run(tmp_path, "fsdp2.py", 2)
    assert_trained(tmp_path, TAGS[:3], {0, 1})
    run(tmp_path, "fsdp2.py", 1)
    assert_trained(tmp_path, TAGS, {None})
