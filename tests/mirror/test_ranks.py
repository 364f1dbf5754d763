"""Many ranks, one mirror: each puts the files that it wrote, the leader the manifest, after all have said that theirs
are there."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from async_ckpt import Catalog

from .making import check_store, content, garbage, remote_content, s3_mirror
from .servers import BUCKET, free_ports, keys

WORLD = 2


Ended = list[tuple[int, str]]


def started(server: Any, root: Path, prefix: str, act: str, world: int) -> list[subprocess.Popen[str]]:
    (port,) = free_ports(1)
    url, options = f"s3://{BUCKET}/{prefix}", json.dumps(dict(server.options()))
    command = [sys.executable, "-m", "tests.mirror.rank_job"]
    what = [*map(str, (world, port, root)), url, options, act]
    how: dict[str, Any] = {"cwd": Path(__file__).parents[2], "text": True}
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [subprocess.Popen([*command, str(rank), *what], **how) for rank in range(world)]


def ended(ranks: list[subprocess.Popen[str]]) -> Ended:
    found = []
    for process in ranks:
        said, wrong = process.communicate(timeout=300)
        found.append((process.returncode, said.strip().rpartition("\n")[2] or wrong[-4000:]))
    return found


@pytest.fixture(scope="module")
def jobs(moto: Any, tmp_path_factory: Any) -> dict[str, tuple[Path, Ended]]:
    """Both jobs at once: each waits for most of its time."""
    roots = {act: tmp_path_factory.mktemp(act) for act in ("nodes", "die")}
    running = {act: started(moto, roots[act], f"ranks-{act}", act, 3 if act == "nodes" else WORLD) for act in roots}
    return {act: (roots[act], ended(ranks)) for act, ranks in running.items()}


@pytest.mark.wide
def test_each_node_with_a_root_of_its_own_has_a_place_of_its_own(moto: Any, jobs: Any) -> None:
    root, found_by_rank = jobs["nodes"]
    assert found_by_rank == [(0, "[null, null]")] * 3
    for node, ranks in ((0, (0, 1)), (1, (2,))):
        mirror = s3_mirror(moto, f"ranks-nodes/node-{node}")
        assert check_store(mirror) == ["step-0", "step-1"]
        found = remote_content(mirror, "step-1")
        assert found == content(root / f"node-{node}", "step-1")
        assert found is not None and sorted(found) == [f"rank-{rank}.pt" for rank in ranks]
        assert garbage(moto, f"ranks-nodes/node-{node}") == []


@pytest.mark.wide
def test_each_rank_mirrors_what_it_wrote_and_without_one_there_is_no_manifest(moto: Any, jobs: Any) -> None:
    prefix = "ranks-die"
    root, (first, second) = jobs["die"]
    assert second[0] == -signal.SIGKILL, second
    assert first[0] == 0 and json.loads(first[1])[0] is None
    assert Catalog(root).tags() == ["step-0", "step-1"]
    assert sum("/step-0/" in key and key.endswith(".pt") for key in keys(moto, prefix)) == WORLD
    assert remote_content(s3_mirror(moto, prefix), "step-0") == content(root, "step-0")
    told, tags = json.loads(first[1])[1], check_store(s3_mirror(moto, prefix))
    # Rank 1 may have sent its file in the moment before it died.
    assert (told is None and tags == ["step-0", "step-1"]) or (
        "rank(s) 1 have not mirrored" in told and tags == ["step-0"]
    )
