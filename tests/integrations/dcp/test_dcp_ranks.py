"""DCP over several gloo ranks: FSDP2 and DTensor, resharding, stock readers, failures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from async_ckpt import Catalog
from tests.integrations.dcp import work
from tests.support.processes import run_ranks

pytestmark = pytest.mark.wide


def assert_same(found: Any, expected: Any, path: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, path
        assert torch.equal(found, expected), path
    else:
        assert found == expected, path


@pytest.mark.parametrize(("how", "world_size"), [("sync", 4), ("THREAD", 2), ("PROCESS", 2)])
def test_saved_by_many_ranks_and_loaded_by_fewer(tmp_path: Path, how: str, world_size: int) -> None:
    path = str(tmp_path / "root" / "s1")
    expected = run_ranks(tmp_path / "p", world_size, work.save, path, 7, how)[0]
    report = Catalog(tmp_path / "root").verify("s1")
    assert report.ok
    names = set(os.listdir(path))
    assert names == {f"__{rank}_0.distcp" for rank in range(world_size)} | {".metadata", "manifest.json"}
    for fewer, reader in ((2, "ours"), (1, "stock")) if how == "sync" else ((1, "ours"),):
        for found in run_ranks(tmp_path / "p", fewer, work.load, path, reader):
            assert_same(found, expected)
    dcp_to_torch_save(path, str(tmp_path / "whole.pt"))
    assert_same(torch.load(tmp_path / "whole.pt", weights_only=False), expected)


@pytest.mark.parametrize("what", ["full", "unpicklable"])
def test_a_failure_on_one_rank_raises_on_all_and_leaves_the_old_checkpoint(tmp_path: Path, what: str) -> None:
    path = str(tmp_path / "root" / "s1")
    run_ranks(tmp_path / "p", 2, work.save, path, 7, "sync")
    before = Catalog(tmp_path / "root").manifest("s1")
    for failed, message in run_ranks(tmp_path / "p", 2, work.save_while_one_fails, path, what):
        assert failed == [1]
        assert ("disk is full" if what == "full" else "cannot be pickled") in message
    assert Catalog(tmp_path / "root").manifest("s1") == before
    assert Catalog(tmp_path / "root").verify("s1").ok
    assert os.listdir(tmp_path / "root") == ["s1"]


def test_a_planner_that_caches_its_plans(tmp_path: Path) -> None:
    assert run_ranks(tmp_path / "p", 2, work.save_with_cached_plans, str(tmp_path / "root")) == [[True] * 3] * 2


def test_sharded_saves_overlap_training_and_load_on_another_number_of_ranks(tmp_path: Path) -> None:
    root = str(tmp_path / "root")
    expected, modes = run_ranks(tmp_path / "p", 2, work.save_sharded_steps, root)[0]
    assert all("lazy" in mode for mode in modes)
    catalog = Catalog(root)
    assert catalog.tags() == ["s0", "s1", "s2"]
    assert all(catalog.verify(tag).ok for tag in catalog.tags())
    assert catalog.manifest("s1").metadata == {"step": 1}
    assert {entry.rank for entry in catalog.manifest("s1").files} == {0, 1}
    for found, step in run_ranks(tmp_path / "p", 1, work.load_sharded_step, root, "s1"):
        assert step == 1
        assert_same(found, expected["s1"])


def test_a_failing_sharded_save_is_told_apart_on_each_rank(tmp_path: Path) -> None:
    zero, one = run_ranks(tmp_path / "p", 2, work.save_sharded_that_fails, str(tmp_path / "root"))
    assert zero == (["ok", "TagExistsError", "RankFailedError 1", "ok"], ["a", "c"])
    assert one == (["ok", "RankFailedError 0", "UnsupportedStateError", "ok"], ["a", "c"])


def test_a_sharded_save_that_cannot_begin_on_one_rank_raises_at_once_on_all(tmp_path: Path) -> None:
    zero, one = run_ranks(tmp_path / "p", 2, work.save_sharded_that_cannot_begin, str(tmp_path / "root"))
    assert zero == ["RankFailedError", "saved b", "TagExistsError", "saved c"]
    assert one == ["UnsafePathError", "saved b", "RankFailedError", "saved c"]
