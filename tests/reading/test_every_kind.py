"""Whatever `save` accepts, the matching load gives back: every kind of state and dtype, through `load` and
`load_into`."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from async_ckpt import AsyncCheckpointEngine
from async_ckpt.reading.state_tree import flatten

from ..support.comparing import torch_bytes
from ..support.objects import OBJECTS
from ..support.states import STATES

KINDS = STATES | OBJECTS
NOT_IN_PLACE = {
    "tied": ["['f']"],
    "meta": ["['m']['weight']", "['m']['bias']", "['t']"],
    "nested_strided": ["['n']"],
    "nested_jagged": ["['n']"],
}
"""What cannot be written to: an expanded tensor, tensors without memory, nested ones."""


@pytest.fixture
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[AsyncCheckpointEngine]:
    with AsyncCheckpointEngine(tmp_path, staging_bytes=1 << 20, chunk_bytes=64 << 10) as engine:
        yield engine


def zeroed(raw: bytes) -> Any:
    """The state in a file of `torch.save`, without its values."""
    state = torch.load(io.BytesIO(raw), weights_only=False)
    for _, leaf in flatten(state):
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided and not leaf.is_nested and not leaf.is_meta:
            leaf.detach().untyped_storage().fill_(0)  # type: ignore[attr-defined]
    return state


def leaves(state: Any) -> list[tuple[str, type, bytes]]:
    """Every leaf and its value: of a view, the elements that it shows."""
    found = []
    for path, leaf in flatten(state):
        is_plain = (
            type(leaf) is torch.Tensor and leaf.layout == torch.strided and not (leaf.is_nested or leaf.is_quantized)
        )
        found.append(
            (path, type(leaf), torch_bytes(leaf.detach().resolve_conj().resolve_neg().clone() if is_plain else leaf))
        )
    return found


@pytest.mark.wide
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_format(engine: AsyncCheckpointEngine, kind: str) -> None:
    engine.create("t")
    engine.save(KINDS[kind](), "m.pt")
    engine.commit("t").result(60)
    raw = (Path(engine.root) / "t/m.pt").read_bytes()
    expected = torch.load(io.BytesIO(raw), weights_only=False)
    assert torch_bytes(engine.load("t/m.pt", weights_only=False)) == torch_bytes(expected)
    done = engine.load_into(zeroed(raw), "t/m.pt", strict=False, weights_only=False)
    assert leaves(done.state) == leaves(expected)
    assert [line.partition(": ")[0] for line in done.mismatches] == NOT_IN_PLACE.get(kind, [])


def all_dtypes() -> list[torch.dtype]:
    return sorted({value for name in dir(torch) if isinstance(value := getattr(torch, name), torch.dtype)}, key=str)


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Some bytes of that type."""
    torch.manual_seed(0)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.empty(0, dtype=dtype).set_(
        torch.randint(1, 120, (count,), dtype=torch.uint8).untyped_storage(), 0, shape
    )


@pytest.mark.wide
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("format", ["torch", "safetensors"])
@pytest.mark.parametrize("dtype", all_dtypes(), ids=str)
def test_every_dtype(engine: AsyncCheckpointEngine, dtype: torch.dtype, format: Any) -> None:
    engine.create("t")
    accepted = {}
    for shape in ((3, 4), (5,), (), (0,), (0, 7)):
        name = "x".join(map(str, shape)) or "scalar"
        try:
            state = {"v": values(dtype, *shape)}
            engine.save(state, name, format=format)
        except (TypeError, RuntimeError, NotImplementedError):
            # No such tensor can be made, or the format has no such type: refused with the key path.
            continue
        accepted[name] = state["v"]
    engine.commit("t").result(60)
    for name, value in accepted.items():
        loaded = engine.load(f"t/{name}")["v"]
        target = torch.empty_like(value)
        target.untyped_storage().fill_(0)  # type: ignore[attr-defined]
        engine.load_into({"v": target}, f"t/{name}")
        for found in (loaded, target):
            assert (found.dtype, found.shape) == (value.dtype, value.shape)
            assert bytes(found.untyped_storage()) == bytes(value.untyped_storage())
    if format == "torch" and dtype.is_floating_point:
        assert len(accepted) == 5
