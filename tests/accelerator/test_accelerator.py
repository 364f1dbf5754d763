"""Runs the files `cases_*.py`, each in a process of its own: a simulated device is registered for a whole process.

On the simulated accelerator everywhere; on this machine's own where there is one, as far as that can take part.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.support.processes import ROOT, run_python

from . import simulator

pytestmark = pytest.mark.wide

CASES = sorted(Path(__file__).parent.glob("cases_*.py"))
ON_REAL_DEVICES = [path for path in CASES if path.stem in ("cases_faults", "cases_snapshots")]


def run(cases: Path, device: str, scratch: Path) -> None:
    environment = {**os.environ, "ASYNC_CKPT_TEST_DEVICE": device, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    own = ("-o", "python_files=cases_*.py", f"--basetemp={scratch / 'own'}")
    done = run_python("-m", "pytest", "-q", *own, cases, timeout_s=500.0, env=environment)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"


@pytest.mark.parametrize("cases", CASES, ids=[path.stem for path in CASES])
def test_on_the_simulated_accelerator(cases: Path, tmp_path: Path) -> None:
    try:
        simulator.build()
    except simulator.CannotBuild as reason:
        pytest.skip(str(reason))
    run(cases, "simulated", tmp_path)


@pytest.mark.skipif(not torch.accelerator.is_available(), reason="no accelerator on this machine")
@pytest.mark.parametrize("cases", ON_REAL_DEVICES, ids=[path.stem for path in ON_REAL_DEVICES])
def test_on_the_accelerator_of_this_machine(cases: Path, tmp_path: Path) -> None:
    run(cases, "real", tmp_path)
