"""Trees that others delete at the same time, and files that take another's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from async_ckpt.storage.filesystem import FileSystem
from async_ckpt.storage.private_dirs import remove_tree, replacing, tree_of


class Racing(FileSystem):
    """Another process deletes the whole tree when a folder of this name is about to be listed."""

    def __init__(self, top: Path, name: str) -> None:
        super().__init__()
        self.top, self.name = top, name

    def listdir(self, path: str | int) -> list[str]:
        if str(path).endswith(self.name) and self.top.exists():
            remove_tree(FileSystem(), str(self.top))
        return super().listdir(path)


@pytest.mark.parametrize("name", ["tree", "inner"])
def test_what_another_sweep_deletes_first_is_fine(tmp_path: Path, name: str) -> None:
    top = tmp_path / "tree"
    (top / "inner" / "deeper").mkdir(parents=True)
    (top / "file").write_text("x")
    (top / "link").symlink_to(tmp_path)
    assert sorted(path for path, _ in tree_of(FileSystem(), str(top))) == ["file", "inner", "inner/deeper", "link"]
    with pytest.raises(FileNotFoundError):
        tree_of(Racing(top, "deeper"), str(top))
    (top / "inner").mkdir(parents=True)
    remove_tree(Racing(top, name), str(top))
    assert list(tmp_path.iterdir()) == []


class NoRename(FileSystem):
    def rename(self, src: str, dst: str) -> None:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("fails", ["nothing", "the block", "the rename"])
def test_a_file_takes_the_place_of_another_or_leaves_it(tmp_path: Path, fails: str) -> None:
    path, private = tmp_path / "file", tmp_path / ".new"
    path.write_text("old")
    try:
        with replacing(NoRename() if fails == "the rename" else FileSystem(), str(path), str(private)):
            private.write_text("new")
            if fails == "the block":
                raise OSError(28, "No space left on device")
    except OSError:
        assert fails != "nothing"
    assert path.read_text() == ("new" if fails == "nothing" else "old") and not private.exists()
