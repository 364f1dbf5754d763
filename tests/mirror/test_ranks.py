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


def job(server: Any, root: Path, prefix: str, act: str, world: int = WORLD) -> list[tuple[int, str]]:
    (port,) = free_ports(1)
    url = f"s3://{BUCKET}/{prefix}"
    options = json.dumps(dict(server.options()))
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.mirror.rank_job",
                str(rank),
                *map(str, (world, port, root)),
                url,
                options,
                act,
            ],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    ended = []
    for process in ranks:
        said, wrong = process.communicate(timeout=300)
        ended.append((process.returncode, said.strip().rpartition("\n")[2] or wrong[-4000:]))
    return ended


@pytest.mark.wide
def test_each_node_with_a_root_of_its_own_has_a_place_of_its_own(moto: Any, tmp_path: Path, prefix: str) -> None:
    assert job(moto, tmp_path, prefix, "nodes", 3) == [(0, "[null, null]")] * 3
    for node, ranks in ((0, (0, 1)), (1, (2,))):
        mirror = s3_mirror(moto, f"{prefix}/node-{node}")
        assert check_store(mirror) == ["step-0", "step-1"]
        found = remote_content(mirror, "step-1")
        assert found == content(tmp_path / f"node-{node}", "step-1")
        assert found is not None and sorted(found) == [f"rank-{rank}.pt" for rank in ranks]
        assert garbage(moto, f"{prefix}/node-{node}") == []


@pytest.mark.wide
def test_each_rank_mirrors_what_it_wrote_and_without_one_there_is_no_manifest(
    moto: Any, tmp_path: Path, prefix: str
) -> None:
    first, second = job(moto, tmp_path, prefix, "die")
    assert second[0] == -signal.SIGKILL, second
    assert first[0] == 0 and json.loads(first[1])[0] is None
    assert Catalog(tmp_path).tags() == ["step-0", "step-1"]
    assert sum("/step-0/" in key and key.endswith(".pt") for key in keys(moto, prefix)) == WORLD
    assert remote_content(s3_mirror(moto, prefix), "step-0") == content(tmp_path, "step-0")
    told, tags = json.loads(first[1])[1], check_store(s3_mirror(moto, prefix))
    # Rank 1 may have sent its file in the moment before it died.
    assert (told is None and tags == ["step-0", "step-1"]) or (
        "rank(s) 1 have not mirrored" in told and tags == ["step-0"]
    )
