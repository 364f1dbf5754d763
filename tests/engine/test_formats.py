"""One checkpoint, files of several formats."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine, Catalog, PathExistsError, UnsupportedStateError, load

safetensors_torch = pytest.importorskip("safetensors.torch")


@pytest.mark.wide
def test_formats_side_by_side(tmp_path: Path) -> None:
    weights = {"w": torch.arange(1000.0), "b": torch.ones(3, dtype=torch.bfloat16)}
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=4096) as engine:
        engine.create("t")
        engine.save({"__metadata__": {"format": "pt"}, **weights}, "model.safetensors", format="safetensors")
        engine.save({"step": 3, "exp_avg": weights["w"]}, "optim.pt")
        for name, data in {
            "config.json": b'{"a": 1}',
            "empty": b"",
            "tokenizer/big.txt": bytes(range(256)) * 100,
        }.items():
            engine.save_bytes(data, name)
        with pytest.raises(PathExistsError):
            engine.save_bytes(b"again", "config.json")
        engine.commit("t").result(60)
        assert engine.load("t/optim.pt")["step"] == 3
        for name in ("config.json", "empty"):
            with pytest.raises(UnsupportedStateError, match="saved as bytes"):
                engine.load(f"t/{name}")
    found = safetensors_torch.load_file(tmp_path / "t/model.safetensors")
    assert all(torch.equal(found[name], weights[name]) for name in weights)
    assert json.loads((tmp_path / "t/config.json").read_text()) == {"a": 1}
    assert (tmp_path / "t/tokenizer/big.txt").read_bytes() == bytes(range(256)) * 100
    assert (tmp_path / "t/empty").read_bytes() == b""
    assert torch.equal(load(tmp_path / "t/model.safetensors")["w"], weights["w"])
    assert Catalog(tmp_path).verify("t").ok
    formats = {entry.path: entry.format for entry in Catalog(tmp_path).manifest("t").files}
    assert (
        formats["model.safetensors"] == "safetensors"
        and formats["config.json"] == "opaque"
        and formats["optim.pt"] == "torch"
    )


def test_bytes_are_copied_at_once(tmp_path: Path) -> None:
    data = bytearray(b"x" * 100)
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=4096) as engine:
        engine.create("t")
        engine.save_bytes(data, "f")
        data[:] = b"y" * 100
        engine.commit("t").result(60)
    assert (tmp_path / "t/f").read_bytes() == b"x" * 100
