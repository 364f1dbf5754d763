"""`async-ckpt` with URLs, and `async-ckpt mirror`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .making import SMALL, check_store, commit, s3_mirror
from .servers import ACCESS_KEY, BUCKET, SECRET_KEY
from .test_reading import made_in


def run(server: Any, *arguments: str, code: int = 0) -> str:
    environment = {**os.environ, "AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": ACCESS_KEY}
    environment |= {"AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": "us-east-1"}
    done = subprocess.run(
        [sys.executable, "-m", "async_ckpt", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.wide
def test_mirror_catches_up_and_list_shows_it(moto: Any, tmp_path: Path, prefix: str) -> None:
    url = f"s3://{BUCKET}/{prefix}"
    for step in range(3):
        commit(tmp_path, f"step-{step}", SMALL, created=step + 1)
    assert "step-1: mirrored, " in run(moto, "mirror", str(tmp_path), url, "step-1")
    assert check_store(s3_mirror(moto, prefix)) == ["step-1"]
    found = json.loads(run(moto, "mirror", str(tmp_path), url, "--json"))
    assert [(item["tag"], item["error"], item["sent_bytes"] > 0) for item in found] == [
        ("step-0", None, True),
        ("step-1", None, False),
        ("step-2", None, True),
    ]
    assert f"committed, mirrored to {url}" in run(moto, "list", str(tmp_path))
    assert [item["mirrored"] for item in json.loads(run(moto, "list", str(tmp_path), "--json"))] == [[url]] * 3


@pytest.mark.wide
def test_commands_take_urls(moto: Any, tmp_path: Path, prefix: str) -> None:
    url, root = f"s3://{BUCKET}/{prefix}", tmp_path / "root"
    made_in(root, "step-0", "step-1")
    run(moto, "mirror", str(root), url)
    assert [item["tag"] for item in json.loads(run(moto, "list", url, "--json"))] == ["step-0", "step-1"]
    assert "model.pt" in run(moto, "inspect", f"{url}/step-1")
    assert "optim.m" in run(moto, "inspect", f"{url}/step-1/model.pt")
    assert [item["ok"] for item in json.loads(run(moto, "verify", url, "--json"))] == [True, True]
    assert json.loads(run(moto, "verify", f"{url}/step-1", "--json"))[0]["tag"] == "step-1"
    assert "model.w" in run(moto, "diff", f"{url}/step-0", f"{root}/step-1", code=1)
    run(moto, "diff", f"{url}/step-1", f"{root}/step-1")
    run(moto, "export", f"{url}/step-1/model.pt", str(tmp_path / "out.pt"))
    assert (tmp_path / "out.pt").read_bytes() == (root / "step-1" / "model.pt").read_bytes()
    assert "deleted" in run(moto, "prune", url, "--keep-last", "1")
    assert check_store(s3_mirror(moto, prefix)) == ["step-1"]
    assert "no checkpoint 'step-9'" in run(moto, "verify", url, "step-9", code=3)
    assert "not in a committed checkpoint" in run(moto, "inspect", f"{url}/step-9", code=3)


@pytest.mark.wide
def test_a_store_that_ignores_conditions_needs_a_word(rclone: Any, tmp_path: Path, prefix: str) -> None:
    url = f"s3://{BUCKET}/{prefix}"
    commit(tmp_path, "step-0", SMALL)
    assert "--only-writer" in run(rclone, "mirror", str(tmp_path), url, code=1)
    assert "step-0: mirrored, " in run(rclone, "mirror", str(tmp_path), url, "--only-writer")
    assert check_store(s3_mirror(rclone, prefix)) == ["step-0"]


@pytest.mark.parametrize("url", ["nowhere/run", "http://host/run", "s3:///run"])
def test_a_wrong_url_is_wrong_usage(url: str, moto: Any, tmp_path: Path) -> None:
    commit(tmp_path, "step-0", SMALL)
    said = run(moto, "mirror", str(tmp_path), url, code=2)
    assert "a mirror's URL is like" in said or "names no bucket" in said
