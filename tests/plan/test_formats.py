"""compact_views and safetensors: what is written is no more than needed, and the stock readers agree."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from async_ckpt.errors import UnsupportedStateError
from async_ckpt.plan.plan import opaque_state
from async_ckpt.plan.planner import Planner
from tests.support.render import render

safetensors_torch = pytest.importorskip("safetensors.torch")


def big():
    return torch.arange(1000.0)


COMPACT = {
    "overlapping": (lambda b: {"a": b[10:20], "b": b[15:30]}, 80),
    "column": (lambda b: {"a": b.view(10, 100)[:, 3]}, 40),
    "transposed": (lambda b: {"a": b[:100].view(10, 10).t()}, 400),
    "empty_view": (lambda b: [b[5:6], b[7:7]], 4),
    "parameter": (lambda b: {"x": nn.Parameter(b[3:9])}, 24),
    "new_dtype": (lambda b: {"c": torch.arange(20, dtype=torch.int16).view(torch.uint16)[4:8]}, 8),
    "expanded": (lambda b: {"a": b[7:8].expand(50)}, 4),
    "whole": (lambda b: {"a": b}, 4000),
}


def tensors(obj):
    if isinstance(obj, torch.Tensor):
        return [obj]
    items = obj.values() if isinstance(obj, dict) else obj
    return [tensor for item in items if not isinstance(item, int) for tensor in tensors(item)]


@pytest.mark.wide
@pytest.mark.parametrize("name", COMPACT)
@pytest.mark.parametrize("planner_name", ["fast", "torch"])
def test_compact_writes_only_covered_bytes(name, planner_name):
    make, nbytes = COMPACT[name]
    state = make(big())
    whole = state if planner_name == "fast" else [state, bytearray(1)]
    planner = Planner(compact_views=True)
    for _ in range(2):
        planned = planner.plan(whole)
        assert planned.plan.planner == planner_name
        assert sum(planned.plan.payload_nbytes) == nbytes
        loaded = torch.load(io.BytesIO(render(planned)), weights_only=False)
        for got, want in zip(tensors(loaded), tensors(whole), strict=True):
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
    assert planned.cached is (planner_name == "fast")


def test_compact_keeps_sharing_and_whole_storages():
    b = big()
    loaded = torch.load(
        io.BytesIO(render(Planner(compact_views=True).plan({"a": b[10:20], "b": b[15:30]}))), weights_only=True
    )
    loaded["a"][5] = -1
    assert loaded["b"][0] == -1
    raw = torch.arange(100, dtype=torch.uint8)
    planned = Planner(compact_views=True).plan({"a": raw[10:20], "s": raw.untyped_storage(), "x": {1}})
    assert sum(planned.plan.payload_nbytes) == 100


def _every_dtype():
    names = (
        "F4 float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool uint16 uint32 uint64 "
        "complex64 float8_e4m3fn float8_e5m2"
    )
    found = [getattr(torch, name) for name in names.split() if hasattr(torch, name)]
    return {f"{n % 3}.{dtype}": torch.empty(n + 1, 2, dtype=dtype).zero_() for n, dtype in enumerate(found)}


@pytest.mark.parametrize(
    "state",
    [
        {},
        _every_dtype(),
        {
            "b": torch.ones(3),
            "a": torch.zeros(2, dtype=torch.int64),
            "e": torch.empty(0, 3),
            "s": torch.tensor(2.0),
            'q"\n\\é\x7f\x01': torch.ones(1),
        },
        {"p": nn.Parameter(torch.ones(2))},
    ],
    ids=["empty", "dtypes", "names", "parameter"],
)
def test_safetensors_bytes_are_the_librarys(state):
    planner = Planner(format="safetensors")
    planned = planner.plan(state)
    assert render(planned) == safetensors_torch.save(state)
    again = planner.plan(state)
    assert again.cached
    assert render(again, 7) == safetensors_torch.save(state)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=6), st.sampled_from([torch.float32, torch.int8, torch.int64, torch.bool]), max_size=6
    )
)
def test_safetensors_names(names):
    state = {name: torch.zeros(index, dtype=dtype) for index, (name, dtype) in enumerate(names.items())}
    try:
        expected = safetensors_torch.save(state)
    except UnicodeEncodeError:
        return
    assert render(Planner(format="safetensors").plan(state)) == expected


def test_safetensors_copies_what_the_format_cannot_say():
    b = big()
    state = {"t": b.view(10, 100).t(), "s": b[:10], "c": torch.randn(2, dtype=torch.cfloat).conj()}
    loaded = safetensors_torch.load(render(Planner(format="safetensors").plan(state)))
    assert all(torch.equal(loaded[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ([1], "a list"),
        ({1: torch.ones(1)}, "state[1]"),
        ({"a": 3}, "state['a']"),
        ({"a": {"b": torch.ones(1)}}, "state['a']"),
        ({"a": torch.eye(2).to_sparse()}, "state['a']"),
        ({"a": torch.empty(2, device="meta")}, "state['a']"),
        ({"ok": torch.ones(1), "q": torch.ones(2, dtype=torch.complex128)}, "state['q']"),
        ({"__metadata__": torch.ones(1)}, "__metadata__"),
    ],
)
def test_safetensors_refusals_name_the_key(state, path):
    with pytest.raises(UnsupportedStateError) as caught:
        Planner(format="safetensors").plan(state)
    assert path in str(caught.value)


def test_safetensors_metadata_is_in_the_header():
    tensors = {"a": torch.arange(5), "b": torch.zeros(0)}
    planner = Planner(format="torch")
    state = {"__metadata__": {"format": "pt"}, **tensors}
    expected = safetensors_torch.save(tensors, metadata={"format": "pt"})
    assert render(planner.plan(state, name="m", format="safetensors")) == expected
    assert planner.plan(state, name="m", format="safetensors").cached
    assert render(planner.plan(tensors, name="m", format="safetensors")) == safetensors_torch.save(tensors)


@pytest.mark.parametrize("data", [b"", b"{}", bytes(range(256)) * 100])
def test_opaque_bytes_stay_as_they_are(data):
    assert render(opaque_state(data)) == data
