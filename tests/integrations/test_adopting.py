"""Another tool's checkpoint is given a manifest once, whoever else gives it one at the same moment."""

from __future__ import annotations

from pathlib import Path

from async_ckpt import Catalog
from async_ckpt.integrations.adopting import adopt
from async_ckpt.storage.filesystem import FileSystem


class Overtaken(FileSystem):
    """Another process adopts the same folder just before this one writes its manifest."""

    def create_file(self, path: str, data: bytes, reserved_bytes: int = 0) -> None:
        FileSystem().create_file(path, data, reserved_bytes)
        super().create_file(path, data, reserved_bytes)


def test_a_folder_that_another_process_adopts_first_is_adopted(tmp_path: Path) -> None:
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1/weights.bin").write_bytes(b"weights")
    assert adopt(Overtaken(), str(tmp_path), "step-1")
    catalog = Catalog(tmp_path)
    assert catalog.latest() == "step-1" and catalog.verify("step-1").ok
