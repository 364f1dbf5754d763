"""safetensors files: as the library reads them, and hostile headers refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from async_ckpt import CorruptCheckpointError, UnsupportedStateError
from async_ckpt.reading import load as restore

from .committed import commit

safetensors_torch = pytest.importorskip("safetensors.torch")


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    found = {f"w{i}": torch.randn(i, 70) for i in range(40)}
    for dtype in (torch.bfloat16, torch.float16, torch.bool, torch.uint16, torch.float8_e4m3fn, torch.complex64):
        found[str(dtype)] = torch.ones(5).to(dtype)
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8))
        for k in a
    )


@pytest.mark.wide
def test_load_and_load_into(tmp_path: Path) -> None:
    data = safetensors_torch.save(state(), metadata={"x": "y"})
    catalog = commit(tmp_path, "a", {"m.safetensors": data}, extent_bytes=4096, format="safetensors")
    assert same(restore.load_committed(catalog, "a", "m.safetensors"), safetensors_torch.load(data))
    target = {name: torch.zeros_like(tensor) for name, tensor in state().items()}
    restore.load_committed_into(catalog, "a", "m.safetensors", target)
    assert same(target, state())


def test_a_callable_map_location_is_refused(tmp_path: Path) -> None:
    catalog = commit(tmp_path, "a", {"m": safetensors_torch.save(state())}, format="safetensors")
    with pytest.raises(UnsupportedStateError, match="map_location"):
        restore.load_committed(catalog, "a", "m", map_location=lambda storage, loc: storage)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    data = safetensors_torch.save({"w": torch.arange(9.0)})
    catalog = commit(tmp_path, "a", {"m": data}, format="safetensors")
    for i in range(len(data)):
        (tmp_path / "a/m").write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        with pytest.raises(CorruptCheckpointError):
            restore.load_committed(catalog, "a", "m")


def headed(header: object) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(64)


def tensor(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        (1 << 60).to_bytes(8, "little") + b"{}",
        headed(b"["),
        headed(b"[" * 50_000),
        headed([1]),
        headed({"w": 1}),
        headed({"w": tensor(shape=[1 << 62, 1 << 62])}),
        headed({"w": tensor(offsets=(0, 1 << 50), shape=[1 << 48])}),
        headed({"w": tensor(offsets=(-8, 0))}),
        headed({"w": tensor(offsets=(0, 8, 16))}),
        headed({"w": tensor(shape=[True, 2])}),
        headed({"w": tensor(shape=[1] * 100_000)}),
        headed({"w": tensor(shape=[2**62] * 100_000)}),
        headed({"w": tensor(shape=[0, 2**62, 2**62], offsets=(0, 0))}),
        headed({"w": tensor(dtype="F4", shape=[15])}),
        headed(
            b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
        ),
        headed({"w": tensor(), "v": tensor(offsets=(4, 12))}),
    ],
)
def test_hostile_headers(tmp_path: Path, data: bytes) -> None:
    catalog = commit(tmp_path, "a", {"m": data}, format="safetensors")
    with pytest.raises(CorruptCheckpointError):
        restore.load_committed(catalog, "a", "m")
    with pytest.raises(CorruptCheckpointError):
        restore.load_committed_into(catalog, "a", "m", {})


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    catalog = commit(tmp_path, "a", {"m": headed({"w": tensor(dtype="Q3")})}, format="safetensors")
    with pytest.raises(UnsupportedStateError, match="Q3"):
        restore.load_committed(catalog, "a", "m")
