"""`async-ckpt watch`: what is committed and what is being saved, as the root shows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine

from .conftest import Ran
from .test_reading import dead_owner


@pytest.mark.wide
@pytest.mark.leaves_staging
def test_watch_shows_what_is_committed_and_what_is_staged(cli: Callable[..., Ran], tmp_path: Path) -> None:
    root = tmp_path / "root"
    with AsyncCheckpointEngine(root, staging_bytes=1 << 20) as engine:
        for tag in ("step-1", "step-2"):
            engine.create(tag)
            engine.save({"x": torch.zeros(1000)}, "x.pt")
            if tag == "step-1":
                pending = engine.commit(tag)
                pending.result()
                metrics = pending.metrics
        (root / f".staging.lost.{dead_owner()}.0").mkdir()
        as_json, shown = cli("watch", root, "--json"), cli("watch", root, "--once")
        engine.commit("step-2")
    assert as_json.code == shown.code == 0
    seen = json.loads(as_json.out)
    assert set(seen) == {"root", "checkpoints", "staging"}
    (committed,) = seen["checkpoints"]
    assert committed["tag"] == "step-1"
    assert committed["size_bytes"] == (root / "step-1" / "x.pt").stat().st_size
    assert 0 < committed["stall_s"] <= metrics.stall_s + 1e-6
    assert 0 < committed["durable_s"] <= metrics.total_s + 1e-6
    staged = {item["tag"]: item for item in seen["staging"]}
    assert {tag: item["owner_state"] for tag, item in staged.items()} == {"step-2": "alive", "lost": "dead"}
    assert staged["step-2"]["age_s"] < 60
    for word in ("step-1", "durable in", "staging of step-2, live owner", "async-ckpt sweep"):
        assert word in shown.out


def test_watch_shows_a_root_in_which_nothing_happens(cli: Callable[..., Ran], tmp_path: Path) -> None:
    ran = cli("watch", tmp_path, "--once")
    assert ran.code == 0 and "nothing is staged" in ran.out
