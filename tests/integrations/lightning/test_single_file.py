"""The commit of one file, killed or failing at each of its system calls: the old file, the new one, never a part."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt.errors import CheckpointError
from async_ckpt.integrations.lightning.single_file import CheckpointFile, load_file, remove
from async_ckpt.storage.filesystem import FileSystem
from tests.support.faulty_filesystem import FaultyFileSystem, Killed

from .single_files import commit

pytestmark = pytest.mark.wide


def step_at(place: CheckpointFile) -> Any:
    """The step in the file, as stock Lightning and as we read it; None where there is no file."""
    if not os.path.exists(place.final):
        return None
    stock = torch.load(place.final)
    ours = load_file(FileSystem(), place, map_location="cpu", weights_only=True, verify="full")
    assert stock["step"] == ours["step"] and bool((stock["w"] == stock["step"]).all())
    return ours["step"]


def num_calls(tmp_path: Path, old: int | None, work: Any) -> int:
    place = CheckpointFile(str(tmp_path / "count" / "a.ckpt"))
    if old is not None:
        commit(FileSystem(), place, old)
    fs = FaultyFileSystem()
    work(fs, place)
    return fs.num_counted


@pytest.mark.leaves_staging
@pytest.mark.parametrize("old", [None, 1])
@pytest.mark.parametrize("how", ["before", "error"])
def test_a_commit_cut_anywhere(tmp_path: Path, old: int | None, how: Any) -> None:
    seen = set()
    for k in range(num_calls(tmp_path, old, lambda fs, place: commit(fs, place, 2))):
        place = CheckpointFile(str(tmp_path / f"{k}" / "a.ckpt"))
        if old is not None:
            commit(FileSystem(), place, old)
        fs = FaultyFileSystem()
        fs.fail_at(k, errno.EIO) if how == "error" else fs.kill_at(k, how)
        try:
            commit(fs, place, 2)
            is_acknowledged = True
        except (Killed, CheckpointError, OSError):
            is_acknowledged = False
        fs.dispose()
        found = step_at(place)
        assert found == 2 if is_acknowledged else found in (old, 2), f"call {k}"
        # The next run finishes or sweeps, and works.
        commit(FileSystem(), CheckpointFile(str(tmp_path / f"{k}" / "b.ckpt")), 3)
        settled = step_at(place)
        assert settled == 2 or (settled == old and found == old), f"call {k}"
        assert sorted(p.name for p in Path(place.root).iterdir()) == [
            n for n in ("a.ckpt", "b.ckpt") if n[0] == "b" or settled
        ], f"call {k}"
        seen.add((found, settled))
        commit(FileSystem(), place, 4)
        assert step_at(place) == 4
    assert {(old, old), (2, 2), (old, 2)} <= seen, "the sweep met a crash before, between and after the renames"


@pytest.mark.leaves_staging
def test_a_removal_cut_anywhere(tmp_path: Path) -> None:
    for k in range(num_calls(tmp_path, 1, remove)):
        place = CheckpointFile(str(tmp_path / f"{k}" / "a.ckpt"))
        commit(FileSystem(), place, 1)
        fs = FaultyFileSystem()
        fs.kill_at(k)
        with pytest.raises(Killed):
            remove(fs, place)
        fs.dispose()
        assert step_at(place) in (None, 1)
        commit(FileSystem(), CheckpointFile(str(tmp_path / f"{k}" / "b.ckpt")), 3)
        left = [p.name for p in Path(place.root).iterdir()]
        assert sorted(left) == (["a.ckpt", "b.ckpt"] if os.path.exists(place.final) else ["b.ckpt"])
