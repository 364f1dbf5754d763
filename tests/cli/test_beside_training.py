"""Read-only commands beside a real training that commits, replaces, gives up and prunes: no traceback, no wrong
answer.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from .conftest import PYTHON

REPOSITORY = Path(__file__).parent.parent.parent
_NUM_ROUNDS = 40


@pytest.fixture
def training(tmp_path):
    process = subprocess.Popen(
        [PYTHON, "-m", "tests.cli.live_training", str(tmp_path / "root")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=REPOSITORY,
    )
    assert process.stdout.readline() == "ready\n"
    yield tmp_path / "root"
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output


@pytest.mark.wide
def test_every_answer_is_right_while_everything_changes(cli, training, tmp_path):
    """A tag may be gone when its turn comes (3) or be another one by then; it is never damaged, and never a mixture."""
    from safetensors.torch import load_file

    root, target = training, tmp_path / "out.safetensors"
    seen_gone = 0

    def ask(*arguments: object, allowed: tuple[int, ...] = (0,)) -> tuple[int, str]:
        nonlocal seen_gone
        ran = cli(*arguments)
        assert ran.code in allowed, (arguments, ran)
        assert "Traceback" not in ran.err
        seen_gone += ran.code == 3
        return ran.code, ran.out

    for _ in range(_NUM_ROUNDS):
        listed = json.loads(ask("list", root, "--json")[1])
        assert {item["state"] for item in listed} <= {"committed", "staging", "trash", "aside"}
        assert all(result["ok"] for result in json.loads(ask("verify", root, "--json")[1]))
        tags = [item["tag"] for item in listed if item["state"] == "committed"]
        for tag in {*tags[-1:], "same"}:
            code, out = ask("inspect", root / tag, "--json", allowed=(0, 3))
            if code == 0:
                model = next(file for file in json.loads(out) if file["file"] == "model.pt")
                assert {tensor["path"] for tensor in model["tensors"]} == {"a", "b.c"}
            code, out = ask("verify", root, tag, "--json", allowed=(0, 3))
            assert code == 3 or json.loads(out)[0]["ok"]
            code, _ = ask("export", root / tag / "model.pt", target, "--tensors-only", "--overwrite", allowed=(0, 3))
            if code == 0:
                tensors = load_file(target)
                assert tensors["a"].unique().tolist() == tensors["b.c"].unique().tolist()
        code, out = ask("diff", root / tags[0], root / tags[-1], "--json", allowed=(0, 1, 3))
        if code == 1:
            assert {change["change"] for change in json.loads(out)["changes"]} == {"changed"}
        watched = json.loads(ask("watch", root, "--json")[1])
        assert watched["checkpoints"] and all(item["durable_s"] for item in watched["checkpoints"])
        ask("prune", root, "--keep-last", "1", "--dry-run")
        ask("sweep", root, "--dry-run")


def test_a_listing_that_retention_outruns_is_made_again(tmp_path):
    """All that was listed is deleted before it is read: once, an empty root was reported, and `latest` found
    nothing.
    """
    from async_ckpt.reading.catalog import Catalog
    from async_ckpt.storage import transaction
    from async_ckpt.storage.filesystem import FileSystem
    from tests.support.making import OLD, commit

    class Outrun(FileSystem):
        num_listings = 0

        def listdir(self, path: str) -> list[str]:
            names = super().listdir(path)
            self.num_listings += 1
            if self.num_listings == 2:
                commit(tmp_path, "new", OLD, created=2)
                transaction.remove(FileSystem(), str(tmp_path), "old")
            return names

    for ask, answer in ((lambda c: c.tags(), ["new"]), (lambda c: c.latest(), "new")):
        for path in tmp_path.iterdir():
            transaction.remove(FileSystem(), str(tmp_path), path.name)
        commit(tmp_path, "old", OLD, created=1)
        assert ask(Catalog(tmp_path, Outrun())) == answer
