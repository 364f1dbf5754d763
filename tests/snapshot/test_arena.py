"""Promise 7: staging never holds more than `staging_bytes`, for a state of any size; measured in a child process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = """
import json, sys, torch
from async_ckpt import AsyncCheckpointEngine

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

root, staging, repeats = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
state = {f"w{k}": torch.full((1 << 20,), float(k)) for k in range(64)}
# One small checkpoint first: what the pool's threads and torch take once is not what a save takes.
with AsyncCheckpointEngine(root, staging_bytes=1 << 20) as engine:
    engine.create("warm"); engine.save({"w": torch.zeros(10)}, "s.pt"); engine.commit("warm")
with open("/proc/self/clear_refs", "w") as reset:
    reset.write("5")
before = resident("VmRSS")
with AsyncCheckpointEngine(root, staging_bytes=staging, overwrite="replace") as engine:
    for k in range(repeats):
        engine.create("t"); engine.save(state, "s.pt"); engine.commit("t")
print(json.dumps({"extra": resident("VmHWM") - before, "state": sum(t.nbytes for t in state.values())}))
"""


@pytest.mark.wide
@pytest.mark.parametrize("repeats", [1, 6])
def test_peak_memory_is_staging_plus_little(tmp_path: Path, repeats: int) -> None:
    staging = 32 << 20
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), str(staging), str(repeats)],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    seen = json.loads(done.stdout)
    assert seen["state"] == 8 * staging
    assert seen["extra"] <= staging + (64 << 20), seen
