"""A cached plan is reused only for tensors with the same facts, with torch's guards and without them."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from async_ckpt.layout.planner import Planner
from async_ckpt.layout.samefacts import guards_work, same_facts
from async_ckpt.layout.tensorfacts import TensorFacts, look_at


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


def test_this_torch_has_the_guards() -> None:
    assert guards_work()


@pytest.mark.parametrize("guarded", [True, False], ids=["guards", "attributes"])
@pytest.mark.parametrize("name", [name for name in CHANGES if name != "class"])  # types are the structure's business
def test_a_changed_fact_is_seen(name: str, guarded: bool) -> None:
    facts = TensorFacts(look_at([torch.zeros(1), torch.zeros(2, 3)]))
    if not guarded:
        facts._same = None
    assert facts.storages_if_same([torch.ones(1), torch.ones(2, 3)]) is not None
    assert facts.storages_if_same([torch.ones(1), CHANGES[name]()]) is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_modes_do_not_hide_equal_facts(mode: Any) -> None:
    leaf = torch.nn.Parameter(torch.zeros(2, 3))
    facts = TensorFacts(look_at([leaf]))
    with mode():
        assert facts.storages_if_same([leaf]) is not None
        assert TensorFacts(look_at([leaf])).storages_if_same([leaf]) is not None


def test_the_guards_keep_no_tensor_alive() -> None:
    import weakref

    tensor = torch.zeros(2, 3)
    same = same_facts([tensor])
    gone = weakref.ref(tensor)
    del tensor
    assert gone() is None
    assert same is not None and same([torch.ones(2, 3)])


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "device"])  # meta tensors have no bytes to write
def test_a_plan_after_a_changed_fact_is_what_torch_writes(name: str) -> None:
    planner = Planner()
    planner.plan({"a": torch.zeros(1), "b": torch.zeros(2, 3)}, name="f")
    state = {"a": torch.zeros(1), "b": CHANGES[name]()}
    planned = planner.plan(state, name="f")
    assert not planned.cached
    expected = io.BytesIO()
    torch.save(state, expected)
    pickle_in = expected.getvalue()[: planned.plan.literals[0][0] + len(planned.plan.literals[0][1])]
    assert planned.plan.file_bytes == len(expected.getvalue())
    assert planned.plan.literals[0][1][64:200] == pickle_in[64:200]
