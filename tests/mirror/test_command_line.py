"""`async-ckpt` with URLs, and `async-ckpt mirror`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import AsyncCheckpointEngine, Catalog, Mirror
from async_ckpt.cli import main

from .making import SMALL, check_store, commit, s3_mirror
from .servers import BUCKET, aws_environment, client, keys
from .test_reading import made_in


@pytest.fixture
def run(monkeypatch: Any, capsys: Any) -> Callable[..., str]:
    """Run a command line in this process, with a server's credentials in the environment; returns what it said."""

    def call(server: Any, *arguments: object, code: int = 0) -> str:
        aws_environment(monkeypatch, server)
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        said = "".join(capsys.readouterr())
        assert (left.value.code or 0) == code, said
        return said

    return call


@pytest.mark.wide
def test_mirror_catches_up_and_list_shows_it(run: Any, moto: Any, tmp_path: Path, prefix: str) -> None:
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
    # What somebody has deleted there is put again; copies are no checkpoints of their own.
    deleted = [*keys(moto, f"{prefix}/step-1/"), keys(moto, f"{prefix}/step-2/")[0]]
    for key in deleted:
        client(moto).delete_object(Bucket=BUCKET, Key=key)
    # As a server's console does that makes folders.
    client(moto).put_object(Bucket=BUCKET, Key=f"{prefix}/step-1/{deleted[0].split('/')[2]}/", Body=b"")
    shutil.copytree(tmp_path / "step-1", tmp_path / "copy (1)")
    said = run(moto, "mirror", str(tmp_path), url)
    assert "step-0: mirrored already" in said and "step-1: mirrored, " in said and "step-2: mirrored, " in said
    assert check_store(s3_mirror(moto, prefix)) == ["step-0", "step-1", "step-2"]
    assert [item["extra"] for item in json.loads(run(moto, "verify", url, "--json"))] == [[], [], []]
    assert "is a copy of 'step-1'" in run(moto, "mirror", str(tmp_path), url, "copy (1)", code=2)
    assert "no checkpoint 'step-9'" in run(moto, "mirror", str(tmp_path), url, "step-9", code=3)
    assert "is a store" in run(moto, "mirror", url, url, code=2)


@pytest.mark.wide
def test_commands_take_urls(run: Any, moto: Any, tmp_path: Path, prefix: str) -> None:
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
    assert json.loads(run(moto, "verify", f"{url}/step-1/model.pt", "--json"))[0]["tag"] == "step-1"
    assert "nothing is in" in run(moto, "list", f"{url}-typo", code=3)
    assert "is a root; name one of its checkpoints" in run(moto, "inspect", url, code=2)
    assert "no checkpoint 'step-9'" in run(moto, "verify", url, "step-9", code=3)
    assert "not in a committed checkpoint" in run(moto, "inspect", f"{url}/step-9", code=3)


def test_prune_holds_what_an_engine_has_not_mirrored_yet(run: Any, moto: Any, tmp_path: Path) -> None:
    root, standing = tmp_path / "root", Mirror(f"file://{tmp_path}/standing")
    with AsyncCheckpointEngine(root, staging_bytes=16 << 20, mirrors=(standing,)) as engine:
        for tag in ("step-0", "step-1"):
            engine.create(tag)
            engine.commit(tag).mirrored.result(60)
    made_in(root, "step-2", "step-3")
    # What goes elsewhere by hand says nothing about the others.
    run(moto, "mirror", root, f"file://{tmp_path}/by-hand", "step-2")

    def kept(*more: str) -> list[str]:
        found = json.loads(run(moto, "prune", root, "--keep-last", "1", "--json", *more))
        return [item["tag"] for item in found if item["keep"]]

    assert kept("--dry-run") == kept() == ["step-2", "step-3"] == Catalog(root).tags()
    assert f"not mirrored yet to {standing.url} (--ignore-mirrors" in run(moto, "prune", root, "--keep-last", "1")
    assert kept("--ignore-mirrors") == ["step-3"] == Catalog(root).tags()


@pytest.mark.wide
def test_a_store_that_ignores_conditions_needs_a_word(run: Any, rclone: Any, tmp_path: Path, prefix: str) -> None:
    url = f"s3://{BUCKET}/{prefix}"
    commit(tmp_path, "step-0", SMALL)
    assert "--only-writer" in run(rclone, "mirror", str(tmp_path), url, code=1)
    assert "step-0: mirrored, " in run(rclone, "mirror", str(tmp_path), url, "--only-writer")
    assert check_store(s3_mirror(rclone, prefix)) == ["step-0"]


@pytest.mark.parametrize("url", ["nowhere/run", "http://host/run", "s3:///run"])
def test_a_wrong_url_is_wrong_usage(url: str, run: Any, moto: Any, tmp_path: Path) -> None:
    commit(tmp_path, "step-0", SMALL)
    said = run(moto, "mirror", str(tmp_path), url, code=2)
    assert "a mirror's URL is like" in said or "names no bucket" in said
