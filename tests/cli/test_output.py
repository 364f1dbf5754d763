"""What the commands write where: closed and full streams, pipes, a terminal with many checkpoints, folders of single
files."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
import torch

from ..integrations.lightning.single_files import commit_file
from ..reading.committed import commit
from ..support.comparing import flip, torch_bytes
from .conftest import PYTHON


@pytest.mark.wide
@pytest.mark.parametrize(
    "closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full", "> /dev/full 2>&1"]
)
@pytest.mark.parametrize("command", ["list {root}", "verify {root}", "--help"])
def test_closed_and_full_streams_give_no_traceback(root: Path, command: str, closed: str) -> None:
    shown = f"{PYTHON} -m async_ckpt {command.format(root=root)} {closed}"
    ran = subprocess.run(["sh", "-c", shown], capture_output=True, text=True)
    assert "Traceback" not in ran.stderr and "Exception ignored" not in ran.stderr, ran.stderr
    assert ran.returncode == (closed.startswith("> /dev/full") and "--help" not in command), ran


def test_one_long_metadata_does_not_pad_all_lines(cli, tmp_path: Path) -> None:
    from async_ckpt import AsyncCheckpointEngine

    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20) as engine:
        for number, note in enumerate(("short", "x" * 3000)):
            engine.create(f"t{number}")
            engine.save({}, "m.pt")
            engine.commit(f"t{number}", {"note": note})
    first, second = cli("list", tmp_path).out.splitlines()[1:]
    assert len(first) < 150
    assert "x" * 3000 in second


@pytest.mark.wide
def test_verifying_many_on_a_terminal_draws_one_bar(tmp_path: Path) -> None:
    for number in range(60):
        commit(tmp_path, f"step-{number}", {"m.pt": torch_bytes({"w": torch.ones(10)})})
    output = b""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(PYTHON, [PYTHON, "-m", "async_ckpt", "verify", str(tmp_path)])
    try:
        while chunk := os.read(terminal, 1 << 16):
            output += chunk
    except OSError:
        # How a terminal says that its process has ended.
        pass
    finally:
        os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    # The bar is one line at each drawing; with a task for each checkpoint there would be up to sixty.
    assert output.count(b"verifying step-") < 200
    assert b"step-59" in output


def test_folders_of_single_files_are_listed_and_verified(cli, tmp_path: Path) -> None:
    for step, name in enumerate(("epoch=0.ckpt", "größe (1).ckpt")):
        commit_file(tmp_path / name, step)
    items = json.loads(cli("list", tmp_path, "--json").out)
    assert [item["state"] for item in items] == ["committed", "committed"]
    assert items[0]["tag"] == "epoch=0.ckpt"
    assert cli("verify", tmp_path).code == 0
    assert [result["ok"] for result in json.loads(cli("verify", tmp_path, "--json").out)] == [True, True]
    flip(tmp_path / "epoch=0.ckpt", 700)
    assert [result["ok"] for result in json.loads(cli("verify", tmp_path, "--json").out)] == [False, True]
    assert cli("verify", tmp_path / "epoch=0.ckpt").code == 1
    assert cli("verify", tmp_path / "größe (1).ckpt").code == 0
    assert "w" in cli("inspect", tmp_path / "größe (1).ckpt").out
    assert cli("export", tmp_path / "größe (1).ckpt", tmp_path / "copy.pt").code == 0
    assert (tmp_path / "copy.pt").read_bytes() == (tmp_path / "größe (1).ckpt").read_bytes()
    prune = ("prune", tmp_path, "--keep-last", "1")
    for arguments in (("delete", tmp_path, "epoch=0.ckpt"), prune, (*prune, "--dry-run")):
        refused = cli(*arguments)
        assert refused.code == 2 and "delete them as files" in refused.err
    (tmp_path / "epoch=0.ckpt").unlink()
    assert cli("list", tmp_path).code == 1
