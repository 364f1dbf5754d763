"""prune, sweep, export, watch, demo, bench."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.storage.delete import sweep
from async_ckpt.storage.filesystem import FileSystem

from ..reading.committed import commit
from ..support.comparing import torch_bytes
from .conftest import PYTHON
from .test_reading import dead_owner, stage


@pytest.mark.wide
def test_prune_dry_run_says_why_and_deletes_nothing(cli, root):
    ran = cli("prune", root, "--keep-last", "1", "--keep-every", "1000", "--dry-run")
    assert ran.code == 0
    assert "would be deleted" in ran.out
    assert "among the last 1" in ran.out
    assert (root / "step-100").exists()


def test_prune_deletes_and_keeps_the_newest(cli, root):
    decisions = json.loads(cli("prune", root, "--keep-best", "loss", "--best-mode", "min", "--json").out)
    assert [(d["tag"], d["deleted"]) for d in decisions] == [("step-100", True), ("step-200", False)]
    assert sorted(path.name for path in root.iterdir()) == ["step-200"]


def test_prune_keeps_everything_while_the_newest_is_damaged(cli, root):
    (root / "step-200" / "model.pt").unlink()
    assert "damaged" in cli("prune", root, "--keep-last", "1").out
    assert (root / "step-100").exists()


def test_prune_by_a_metric_that_no_checkpoint_has_a_number_of_deletes_nothing(cli, tmp_path):
    with AsyncCheckpointEngine(tmp_path, staging_bytes=4 << 20) as engine:
        for tag in ("step-1", "step-2"):
            engine.create(tag)
            engine.save(torch.ones(1), "w.pt")
            engine.commit(tag, metadata={"loss": float("nan")})
    ran = cli("prune", tmp_path, "--keep-best", "loss")
    assert ran.code == 3 and "loss" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1", "step-2"]


def test_prune_by_age(cli, root):
    assert all(decision["keep"] for decision in json.loads(cli("prune", root, "--keep-newer-than", "2d", "--json").out))


def test_prune_says_what_cannot_be_deleted(cli, root):
    if os.geteuid() == 0:
        pytest.skip("root may delete everything")
    root.chmod(0o555)
    try:
        ran = cli("prune", root, "--keep-last", "1")
    finally:
        root.chmod(0o755)
    assert ran.code == 1
    assert "not deleted" in ran.out


def test_delete_of_named_checkpoints(cli, root):
    assert cli("delete", root / "step-100" / "model.pt").code == 2
    assert cli("delete", root, "step-100", "step-999").code == 3
    assert (root / "step-100").exists(), "all are looked for before the first is deleted"
    assert json.loads(cli("delete", root / "step-100", "--json").out) == ["step-100"]
    assert sorted(path.name for path in root.iterdir()) == ["step-200"]
    (root / "step-200" / "manifest.json").write_text("damaged")
    assert "deleted step-200" in cli("delete", root, "step-200").out
    assert list(root.iterdir()) == []
    assert cli("delete", root, "step-200").code == 3
    assert cli("delete", root).code == 3


@pytest.mark.leaves_staging
def test_sweep_removes_only_what_dead_owners_left(cli, root):
    from async_ckpt.host.process import current_owner

    stage(root, "step-300", str(current_owner()))
    stage(root, "step-400", dead_owner())
    assert "owner is dead" in cli("sweep", root, "--dry-run").out
    done = {
        item["name"].split(".")[1]: item["action"]
        for item in json.loads(cli("sweep", root, "--json").out)
        if item["tag"] != "step-300"
    }
    assert done == {"staging": "removed"}
    left = sorted(path.name for path in root.iterdir())
    assert len(left) == 3
    assert left[0].startswith(".staging.step-300")


def test_export_of_a_torch_file_is_a_verified_byte_copy(cli, root, tmp_path):
    target = tmp_path / "out.pt"
    assert cli("export", root / "step-100" / "model.pt", target).code == 0
    assert target.read_bytes() == (root / "step-100" / "model.pt").read_bytes()
    assert cli("export", root / "step-100" / "model.pt", target).code == 2
    assert cli("export", root / "step-100" / "model.pt", target, "--overwrite").code == 0


def test_export_of_a_damaged_file_writes_nothing(cli, root, tmp_path):
    from ..support.comparing import flip

    flip(root / "step-100" / "model.pt", 3000)
    ran = cli("export", root / "step-100" / "model.pt", tmp_path / "out.pt")
    assert ran.code == 1
    assert "model.pt" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root"]


def test_export_of_a_tensor_without_its_memory(cli, tmp_path):
    commit(tmp_path / "r", "t", {"m.pt": torch_bytes({"w": torch.ones(1).expand(1 << 40)})})
    ran = cli("export", tmp_path / "r/t/m.pt", tmp_path / "out.safetensors")
    assert ran.code == 1 and "4398046511104" in ran.err and "Traceback" not in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_export_to_safetensors(cli, root, tmp_path):
    from safetensors.torch import load_file

    target = tmp_path / "out.safetensors"
    refused = cli("export", root / "step-200" / "model.pt", target)
    assert refused.code == 1
    assert "step" in refused.err
    assert not target.exists()
    assert cli("export", root / "step-200" / "model.pt", target, "--tensors-only").code == 0
    state = torch.load(root / "step-200" / "model.pt")["model"]
    found = load_file(target)
    assert set(found) == {f"model.{name}" for name in state}
    assert all(torch.equal(found[f"model.{name}"], tensor) for name, tensor in state.items())


def test_export_of_a_safetensors_file_to_torch(cli, tmp_path):
    state = {"w": torch.arange(6.0), "b": torch.ones(2, 3)}
    with AsyncCheckpointEngine(tmp_path / "r", staging_bytes=4 << 20) as engine:
        engine.create("t")
        engine.save(state, "m.safetensors", format="safetensors")
        engine.commit("t")
    assert cli("export", tmp_path / "r/t/m.safetensors", tmp_path / "out.pt").code == 0
    found = torch.load(tmp_path / "out.pt")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.wide
def test_bench_gives_advice(cli, tmp_path):
    ran = cli("bench", tmp_path, "--seconds", "2", "--checkpoint-gib", "0.5", "--json")
    assert ran.code == 0
    found = json.loads(ran.out)
    assert found["advice"]["num_writers"] >= 1
    assert found["advice"]["io_mode"] in ("direct", "buffered")
    assert found["advice"]["staging_bytes"] >= 0.5 * 2**30
    assert all(row["median_bytes_per_s"] > 0 for row in found["disk"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_demo_trains_saves_and_resumes(cli, tmp_path):
    arguments = ("demo", "--root", tmp_path / "root", "--save-every", "2", "--device", "cpu")
    first = cli(*arguments, "--steps", "4", "--plot", tmp_path / "steps.png", "--trace", tmp_path / "trace.json")
    assert first.code == 0
    assert "stall per save" in first.out
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert "resumed from step-000004" in cli(*arguments, "--steps", "6").out
    assert "was reached" in cli(*arguments, "--steps", "6").out
    assert cli("verify", tmp_path / "root").code == 0


KILLED_BENCH = """
import os, sys
from async_ckpt.cli.bench import DiskMeasurement
disk = DiskMeasurement(sys.argv[1])
open(os.path.join(disk._folder, "file"), "w").close()
os.kill(os.getpid(), 9)
"""


@pytest.mark.wide
@pytest.mark.parametrize("command", [("bench", "--seconds", "2", "--json"), ("sweep",)], ids=lambda command: command[0])
def test_what_a_killed_bench_left_is_removed(cli, tmp_path, command):
    subprocess.run([PYTHON, "-c", KILLED_BENCH, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".trash.bench.")
    (tmp_path / ".bench.mine").mkdir()
    assert cli(command[0], tmp_path, *command[1:]).code == 0
    assert list(tmp_path.iterdir()) == [tmp_path / ".bench.mine"]


@pytest.mark.wide
def test_a_measurement_that_runs_is_left_alone(tmp_path):
    from async_ckpt.cli.bench import DiskMeasurement

    with DiskMeasurement(str(tmp_path)):
        assert [swept.action for swept in sweep(FileSystem(), str(tmp_path))] == ["left"]
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []
