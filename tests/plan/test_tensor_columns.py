"""A cached plan is reused only for tensors with the same facts, whatever takes a dense tensor's place."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from async_ckpt.plan.planner import Planner
from async_ckpt.plan.tensor_columns import TensorFacts, look_at
from tests.support.comparing import torch_bytes
from tests.support.render import render


def _with_attribute() -> torch.Tensor:
    tensor = torch.zeros(2, 3)
    tensor.note = "kept"  # type: ignore[attr-defined]
    return tensor


CHANGES: dict[str, Callable[[], torch.Tensor]] = {
    "size": lambda: torch.zeros(3, 2),
    "dimensions": lambda: torch.zeros(6),
    "strides": lambda: torch.zeros(3, 2).t(),
    "offset": lambda: torch.zeros(7)[1:].view(2, 3),
    "dtype": lambda: torch.zeros(2, 3, dtype=torch.int32),
    "dtype of the same size": lambda: torch.zeros(2, 3, dtype=torch.uint16).view(torch.float16),
    "requires_grad": lambda: torch.zeros(2, 3, requires_grad=True),
    "class": lambda: torch.nn.Parameter(torch.zeros(2, 3), requires_grad=False),
    "negative bit": lambda: torch._neg_view(torch.zeros(2, 3)),
    "conjugate bit": lambda: torch.zeros(2, 3, dtype=torch.complex64).conj(),
    "layout": lambda: torch.zeros(2, 3).to_sparse(),
    "device": lambda: torch.zeros(2, 3, device="meta"),
    "attribute": _with_attribute,
}


@pytest.mark.wide
@pytest.mark.parametrize("name", [name for name in CHANGES if name != "class"])  # types are the structure's business
def test_a_changed_fact_is_seen(name: str) -> None:
    facts = TensorFacts(*look_at([torch.zeros(1), torch.zeros(2, 3)]))
    assert facts.match([torch.ones(1), torch.ones(2, 3)]) is not None
    assert facts.match([torch.ones(1), CHANGES[name]()]) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_modes_do_not_hide_equal_facts(mode: Any) -> None:
    leaf = torch.nn.Parameter(torch.zeros(2, 3))
    facts = TensorFacts(*look_at([leaf]))
    with mode():
        assert facts.match([leaf]) is not None
        assert TensorFacts(*look_at([leaf])).match([leaf]) is not None


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "device"])  # meta tensors have no bytes to write
def test_a_plan_after_a_changed_fact_is_what_torch_writes(name: str) -> None:
    planner = Planner()
    planner.plan({"a": torch.zeros(1), "b": torch.zeros(2, 3)}, name="f")
    state = {"a": torch.zeros(1), "b": CHANGES[name]()}
    planned = planner.plan(state, name="f")
    assert not planned.cached
    expected = torch_bytes(state)
    pickle_in = expected[: planned.plan.literals[0][0] + len(planned.plan.literals[0][1])]
    assert planned.plan.file_bytes == len(expected)
    assert planned.plan.literals[0][1][64:200] == pickle_in[64:200]


def quantized(scale: float, zero_point: int) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.zeros(2, 3), scale, zero_point, torch.qint8)


def quantized_by_channel(scale: float, axis: int) -> torch.Tensor:
    scales = torch.full((3 - (axis == 0),), scale, dtype=torch.float64)
    return torch.quantize_per_channel(torch.zeros(2, 3), scales, torch.zeros(len(scales)).long(), axis, torch.quint8)


@pytest.mark.filterwarnings("ignore:.*quantize")
@pytest.mark.parametrize("compact_views", [False, True])
@pytest.mark.parametrize(
    ("make", "first", "second"),
    [
        (quantized, (0.1, 0), (0.2, 0)),
        (quantized, (0.1, 0), (0.1, 7)),
        (quantized_by_channel, (0.1, 0), (0.2, 0)),
        (quantized_by_channel, (0.1, 0), (0.1, 1)),
    ],
)
def test_what_the_numbers_of_a_quantised_tensor_mean_is_written_anew(
    make: Callable[..., torch.Tensor], first: tuple[float, int], second: tuple[float, int], compact_views: bool
) -> None:
    planner = Planner(compact_views=compact_views)
    for arguments in (first, first, second):
        state = {"a": torch.zeros(1), "b": make(*arguments), "step": arguments[1]}
        assert render(planner.plan(state, name="f")) == torch_bytes(state)


STRANGE = """
"strided nested": torch.nested.nested_tensor([torch.zeros(2, 3)]),
"jagged nested": torch.nested.nested_tensor([torch.zeros(2, 3)], layout=torch.jagged),
"sparse": torch.zeros(2, 3).to_sparse(),
"compressed": torch.zeros(2, 3).to_sparse_csr(),
"opaque": torch.zeros(2, 3).to_mkldnn(),
"quantised": torch.quantize_per_tensor(torch.zeros(2, 3), 0.1, 0, torch.qint8),
"zero": torch._efficientzerotensor((2, 3)),
"functional": torch._to_functional_tensor(torch.zeros(2, 3)),
"batched": torch._C._functorch._add_batch_dim(torch.zeros(4, 2, 3), 0, 1),
"inference": torch.inference_mode()(lambda: torch.zeros(2, 3))(),
"uninitialised": torch.nn.UninitializedBuffer(),
"""
"""Of tensors whose class or attributes are those of a dense one, but whose memory is not."""


@pytest.mark.wide
def test_no_tensor_in_a_dense_ones_place_ends_the_process() -> None:
    script = f"""
import io, warnings, torch
from async_ckpt.errors import UnsupportedStateError
from async_ckpt.plan.planner import Planner
from tests.support.render import render
warnings.simplefilter("ignore")
for name, tensor in {{{STRANGE}}}.items():
    planner = Planner()
    planner.plan([torch.zeros(1), torch.zeros(2, 3)])
    file = io.BytesIO()
    try:
        torch.save([torch.zeros(1), tensor], file)
    except Exception:
        file = None
    try:
        assert render(planner.plan([torch.zeros(1), tensor])) == file.getvalue(), name
    except UnsupportedStateError as error:
        assert file is None and "state[1]" in str(error), name
    print(name)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == STRANGE.count("\n") - 1
