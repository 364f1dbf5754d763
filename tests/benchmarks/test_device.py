"""The device benchmark end to end on the simulated accelerator: that it works on the day when there is a device."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.device import GOALS
from tests.accelerator import simulator
from tests.support.processes import ROOT, run_python

pytestmark = pytest.mark.wide


def test_it_runs_on_the_simulated_device_and_leaves_one_file(tmp_path: Path) -> None:
    try:
        simulator.build()
    except simulator.CannotBuild as reason:
        pytest.skip(str(reason))
    scratch, out = tmp_path / "scratch", tmp_path / "device.json"
    scratch.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = ("-m", "benchmarks.device", scratch, "--out", out, "--simulated", "--skip-tests")
    done = run_python(*command, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(out.read_text())
    assert report["device"] == "simulated:0" and report["is_simulated"] and report["tests"] is None
    assert set(report["goals"]) == set(GOALS)
    assert report["goals"]["guarded_host_waits"]["met"] is True
    assert report["figures"]["is_pinned"] is True
    # No time of a simulated device means anything.
    assert [name for name, value in report["figures"].items() if name.endswith("_s") and value is not None] == []
    assert {"save", "d2h", "write"} <= {span["kind"] for span in report["figures"]["timeline"]}
    assert list(scratch.iterdir()) == []
