"""list, inspect, verify, diff: what they say, their exit codes, and that they touch nothing."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.format.names import MANIFEST_NAME
from async_ckpt.host.process import current_owner

from ..support.comparing import flip
from .conftest import listing

DEAD = "0" * 8


def dead_owner() -> str:
    """An owner of this kernel and namespace whose process is certainly gone."""
    me = current_owner()
    return f"{me.host}-{me.boot}-{me.pid_namespace}-{4_000_000}-1"


def stage(root, tag: str, owner: str, num_bytes: int = 10) -> None:
    path = root / f".staging.{tag}.{owner}.0"
    path.mkdir(mode=0o700)
    (path / "model.pt").write_bytes(bytes(num_bytes))


@pytest.mark.wide
def test_list_shows_step_metadata_size_and_state(cli, root):
    ran = cli("list", root)
    assert ran.code == 0
    header, first, second = ran.out.splitlines()
    assert header.split() == ["tag", "step", "metadata", "age", "size", "files", "state"]
    assert first.startswith("step-100")
    assert "loss=0.03" in first
    assert first.endswith("committed")
    assert second.split()[:2] == ["step-200", "200"]
    assert "\x1b" not in ran.out


def test_list_as_json(cli, root):
    items = json.loads(cli("list", root, "--json").out)
    assert [item["tag"] for item in items] == ["step-100", "step-200"]
    assert items[1]["metadata"] == {"step": 200, "loss": 0.015, "note": "\x1b[31mred"}
    size_bytes = sum(path.stat().st_size for path in (root / "step-200").rglob("*.pt"))
    assert (items[1]["size_bytes"], items[1]["num_files"], items[1]["state"]) == (size_bytes, 2, "committed")


@pytest.mark.leaves_staging
def test_list_tells_staging_of_live_and_dead_owners_and_damage(cli, root):
    stage(root, "step-300", str(current_owner()), 7)
    stage(root, "step-400", dead_owner())
    (root / "step-100" / "model.pt").unlink()
    (root / "step-200" / MANIFEST_NAME).write_bytes(b"{}")
    (root / "notes").mkdir()
    before = listing(root)
    ran = cli("list", root, "--json")
    items = {item["tag"]: item for item in json.loads(ran.out)}
    assert ran.code == 1
    assert "missing" in items["step-100"]["problem"]
    assert items["step-200"]["state"] == "damaged"
    assert (items["step-300"]["state"], items["step-300"]["owner_state"], items["step-300"]["size_bytes"]) == (
        "staging",
        "alive",
        7,
    )
    assert items["step-400"]["owner_state"] == "dead"
    assert "notes" not in items
    table = cli("list", root).out
    assert "staging, live owner" in table
    assert "staging, dead owner" in table
    assert listing(root) == before


def test_list_shows_numbers_that_json_cannot_hold(cli, tmp_path):
    with AsyncCheckpointEngine(tmp_path / "root", staging_bytes=1 << 20) as engine:
        engine.create("a")
        engine.save({"w": torch.ones(2)}, "model.pt")
        engine.commit("a", metadata={"loss": float("nan"), "eval": {"best": [1.5, -math.inf]}, "none": None}).result(60)
        engine.create("b")
        engine.save({"w": torch.ones(2)}, "model.pt")
        engine.commit("b", metadata={"loss": 0.5}).result(60)
    first, second = json.loads(cli("list", tmp_path / "root", "--json").out)
    assert first["metadata"] == {"loss": None, "eval": {"best": [1.5, None]}, "none": None}
    assert first["not_finite"] == {"metadata['loss']": "nan", "metadata['eval']['best'][1]": "-inf"}
    assert "not_finite" not in second
    assert 'loss=nan eval={"best": [1.5, -Infinity]} none=null' in cli("list", tmp_path / "root").out


def test_list_of_an_empty_root(cli, tmp_path):
    assert cli("list", tmp_path).code == 0
    assert json.loads(cli("list", tmp_path, "--json").out) == []


def test_verify_all_and_one(cli, root):
    ran = cli("verify", root)
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines()] == ["tag", "step-100", "step-200"]
    assert "/s" in ran.out
    one = json.loads(cli("verify", root, "step-100", "--json").out)
    assert [(result["tag"], result["ok"]) for result in one] == [("step-100", True)]
    assert json.loads(cli("verify", root / "step-200", "--json").out)[0]["tag"] == "step-200"


def test_verify_notes_files_of_others(cli, root):
    (root / "step-100" / "eval_results.json").write_text("{}")
    ran = cli("verify", root)
    assert ran.code == 0
    assert "step-100 also holds, from somebody else: eval_results.json" in ran.out
    assert [result["extra"] for result in json.loads(cli("verify", root, "--json").out)] == [["eval_results.json"], []]
    assert cli("list", root).code == 0


def test_verify_names_file_and_record(cli, root):
    records = json.loads(cli("inspect", root / "step-200" / "model.pt", "--records", "--json").out)[0]["records"]
    bias = next(record for record in records if record["name"] == "data/1")
    flip(root / "step-200" / "model.pt", bias["offset"] + 5)
    ran = cli("verify", root)
    assert ran.code == 1
    assert "DAMAGED" in ran.out
    (problem,) = json.loads(cli("verify", root, "step-200", "--json").out)[0]["problems"]
    assert problem["path"] == "model.pt"
    assert "data/1" in problem["record"]
    assert cli("verify", root, "--level", "size").code == 0


def test_inspect_tree_has_totals_per_prefix_and_shares(cli, root):
    ran = cli("inspect", root / "step-100")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert any("model.pt" in line and "4 tensors" in line for line in lines)
    (weight,) = [line for line in lines if "weight" in line]
    assert "float32 [64, 32]" in weight
    assert "8.00 KiB" in weight
    assert any("tied" in line and "shared" in line for line in lines)
    assert any("sub/optim.pt" in line for line in lines)


def test_inspect_agrees_with_torch(cli, root):
    import torch

    path = root / "step-200" / "model.pt"
    found = json.loads(cli("inspect", path, "--json").out)[0]
    state = torch.load(path)["model"]
    raw = path.read_bytes()
    tensors = {tensor["path"]: tensor for tensor in found["tensors"]}
    assert set(tensors) == {f"model.{name}" for name in state}
    assert found["num_others"] == 1
    for name, tensor in state.items():
        info = tensors[f"model.{name}"]
        assert tuple(info["shape"]) == tuple(tensor.shape)
        assert f"torch.{info['dtype']}" == str(tensor.dtype)
        assert raw[info["offset"] : info["offset"] + info["num_bytes"]] == tensor.contiguous().numpy().tobytes()


def test_inspect_prefix_depth_and_flat(cli, root):
    path = root / "step-100" / "model.pt"
    assert len(json.loads(cli("inspect", path, "--prefix", "model.layer", "--json").out)[0]["tensors"]) == 2
    assert "weight" not in cli("inspect", path, "--depth", "1").out
    assert "model.layer.weight" in cli("inspect", path, "--flat").out
    assert cli("inspect", path, "--records", "--flat").code == 2


def test_diff_by_checksum(cli, root):
    ran = cli("diff", root / "step-100", root / "step-200", "--json")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert {(change["change"], change["tensor"]) for change in found["changes"]} == {
        ("removed", "model.half"),
        ("added", "model.new"),
        ("changed", "model.layer.bias"),
    }
    assert found["num_equal"] == 3
    assert "1 added, 1 removed, 1 changed, 3 equal" in cli("diff", root / "step-100", root / "step-200").out


def test_diff_of_equal_checkpoints_and_files(cli, root):
    assert cli("diff", root / "step-100", root / "step-100").code == 0
    assert cli("diff", root / "step-100" / "sub/optim.pt", root / "step-200" / "sub/optim.pt").code == 0
    assert cli("diff", root / "step-100", root / "step-200" / "model.pt").code == 2


def test_diff_reads_no_tensor_data(root, monkeypatch, cli):
    from async_ckpt.storage import read_file as _file_read

    read = []
    original = _file_read.LocalReadableFile.pread_into

    def counting(self, buffer, offset):
        read.append(len(buffer))
        return original(self, buffer, offset)

    monkeypatch.setattr(_file_read.LocalReadableFile, "pread_into", counting)
    cli("diff", root / "step-100" / "sub/optim.pt", root / "step-200" / "sub/optim.pt")
    assert 0 < sum(read) < 12_000


def test_read_only_commands_leave_the_root_as_it_is(cli, root):
    before = listing(root)
    for arguments in (
        ("list", root),
        ("verify", root),
        ("inspect", root / "step-100"),
        ("diff", root / "step-100", root / "step-200"),
        ("watch", root, "--once"),
        ("watch", root, "--json"),
        ("prune", root, "--keep-last", "1", "--dry-run"),
        ("sweep", root, "--dry-run"),
    ):
        cli(*arguments)
    assert listing(root) == before


def test_read_only_commands_work_where_nothing_may_be_written(cli, root):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    root.chmod(0o500)
    try:
        assert cli("list", root).code == 0
        assert cli("verify", root).code == 0
    finally:
        root.chmod(0o700)
