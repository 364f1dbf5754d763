"""Runs the files `cases_*.py` on the simulated accelerator, each in a process of its own: a device is registered for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import simulator

CASES = sorted(Path(__file__).parent.glob("cases_*.py"))


@pytest.mark.parametrize("cases", CASES, ids=[path.stem for path in CASES])
def test_on_the_simulated_accelerator(cases: Path, tmp_path: Path) -> None:
    try:
        simulator.build()
    except simulator.CannotBuild as reason:
        pytest.skip(str(reason))
    root = Path(__file__).parents[2]
    environment = {**os.environ, "ASYNC_CKPT_SIMULATED": "1", "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-o", "python_files=cases_*.py", f"--basetemp={tmp_path / 'own'}", str(cases)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{done.stdout[-8000:]}\n{done.stderr[-2000:]}"
