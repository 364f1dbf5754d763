"""A cached plan is reused exactly where it is right: every kind of change gives the new bytes, and nothing of the user
is kept alive.
"""

from __future__ import annotations

import gc
import types
import weakref
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from async_ckpt.plan.planner import Planner
from tests.support import objects
from tests.support.comparing import torch_bytes
from tests.support.render import render


def base_state():
    weight = torch.arange(12.0).view(3, 4)
    ordered = OrderedDict(
        [("layer.weight", weight), ("layer.bias", torch.zeros(4, dtype=torch.float64)), ("view", weight[1:])]
    )
    ordered._metadata = OrderedDict([("", {"version": 1})])  # type: ignore[attr-defined]
    return {
        "model": ordered,
        "step": 7,
        "lr": 0.1,
        "flags": [True, None, (0.9, 0.999)],
        "shared": [[1], [1]],
        "same": ["".join(["wo", "rd"])] * 2,
        3: "text",
    }


def object_state():
    return {
        "weights": OrderedDict(a=torch.arange(6.0).view(2, 3)),
        "scaler": objects.Scaler(),
        "fragments": [objects.Fragment(1, 2), objects.Fragment(3, 4)],
        "shapes": OrderedDict(a=torch.Size((2, 3))),
        "rng": np.random.RandomState(3).get_state(),
        "blob": b"blob",
        "other_blob": b"other",
        "best": np.float64(0.5),
        "class": torch.nn.Linear,
        "set": {1, 2},
        "text": "latin2",
        "vars": {},
        "array": np.zeros(3, dtype=object),
    }


def _set(path, value):
    def change(state):
        place = state
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value(place[path[-1]]) if isinstance(value, types.FunctionType) else value

    return change


def _rename(state):
    state["model"] = OrderedDict(
        [("layer.weighx", v) if k == "layer.weight" else (k, v) for k, v in state["model"].items()]
    )


def _scaler(state):
    state["scaler"].cur_scale /= 2
    state["scaler"].cur_iter += 1000
    state["scaler"].inner.start = None if state["scaler"].inner.start is None else 1 << 40


_BIAS = ("model", "layer.bias")
SCALAR_CHANGES = {
    "int": (base_state, _set(("step",), 8)),
    "int_wider": (base_state, _set(("step",), 70_000)),
    "int_huge": (base_state, _set(("step",), 1 << 4000)),
    "float": (base_state, _set(("lr",), 0.2)),
    "negative_zero": (base_state, _set(("lr",), -0.0)),
    "bool": (base_state, _set(("flags", 0), False)),
    "tuple_float": (base_state, _set(("flags", 2), (0.5, 0.999))),
    "nothing": (base_state, lambda state: None),
    "scaler": (object_state, _scaler),
    "fragment": (object_state, lambda state: setattr(state["fragments"][1], "numel", 70_000)),
    "random": (object_state, _set(("rng",), np.random.RandomState(9).get_state())),
    "blob": (object_state, _set(("blob",), "änders".encode() * 100)),
    "numpy_scalar": (object_state, _set(("best",), np.float64(0.7))),
    "size": (object_state, _set(("shapes", "a"), torch.Size((70_000, 3)))),
}
MISSES = {
    "text": (base_state, _set((3,), "other")),
    "scalar_type": (base_state, _set(("step",), 7.0)),
    "bool_for_int": (base_state, _set(("step",), True)),
    "none_for_float": (base_state, _set(("lr",), None)),
    "length": (base_state, _set(("flags",), lambda old: [*old, 1])),
    "key": (base_state, _rename),
    "alias": (base_state, lambda state: _set(("shared", 1), state["shared"][0])(state)),
    "string_identity": (base_state, _set(("same", 1), "".join(["wor", "d"]))),
    "metadata": (base_state, lambda state: state["model"]._metadata.update(x={})),
    "dtype": (base_state, _set(_BIAS, lambda old: old.float())),
    "shape": (base_state, _set(_BIAS, lambda old: old.view(2, 2))),
    "stride": (base_state, _set(("model", "layer.weight"), lambda old: old.t().contiguous().t())),
    "offset": (base_state, _set(("model", "view"), lambda old: old.as_strided((2, 4), (4, 1), 0))),
    "requires_grad": (base_state, _set(_BIAS, lambda old: old.clone().requires_grad_())),
    "parameter": (base_state, _set(_BIAS, lambda old: nn.Parameter(old))),
    "sharing_ends": (base_state, _set(("model", "view"), lambda old: old.clone())),
    "sharing_starts": (base_state, _set(_BIAS, lambda old: torch.zeros(24, dtype=torch.float64)[:4])),
    "storage_grew": (base_state, _set(_BIAS, lambda old: torch.zeros(9, dtype=torch.float64)[:4])),
    "same_tensor_twice": (base_state, _set(("flags", 1), lambda old: torch.ones(1))),
    "attribute": (base_state, lambda state: setattr(state["model"]["layer.bias"], "note", 1)),
    "meta": (base_state, _set(_BIAS, lambda old: torch.empty(4, dtype=torch.float64, device="meta"))),
    "object": (base_state, _set(("step",), {1, 2})),
    "conj": (base_state, _set(_BIAS, lambda old: torch.ones(4, dtype=torch.cfloat).conj())),
    "short_blob": (object_state, _set(("blob",), b"x")),
    "same_blob": (object_state, lambda state: state.update(other_blob=state["blob"])),
    "class": (object_state, _set(("class",), torch.nn.Conv1d)),
    "new_attribute": (object_state, lambda state: setattr(state["scaler"], "new", 1)),
    "no_attribute": (object_state, lambda state: delattr(state["fragments"][0], "note")),
    "other_class": (object_state, _set(("fragments", 0), objects.Frozen(1.0))),
    "dtype_in_object": (object_state, lambda state: setattr(state["scaler"], "dtype", torch.bfloat16)),
    "shared_object": (object_state, lambda state: _set(("fragments", 1), state["fragments"][0])(state)),
    "shared_dict": (object_state, lambda state: state.update(vars=vars(state["scaler"]))),
    "set": (object_state, _set(("set",), {1, 2, 3})),
    "size_length": (object_state, _set(("shapes", "a"), torch.Size((1, 2, 3)))),
    "size_to_tuple": (object_state, _set(("shapes", "a"), (2, 3))),
    "latin1": (object_state, _set(("text",), "".join(("lat", "in1")))),
    "array_kind": (object_state, _set(("array",), np.zeros((3, 2)))),
}


@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCALAR_CHANGES)
def test_changed_scalars_are_spliced_in(name):
    make, change = SCALAR_CHANGES[name]
    planner, state = Planner(), make()
    first = planner.plan(make(), name="a")
    change(state)
    again = planner.plan(state, name="a")
    assert (first.cached, again.cached) == (False, True)
    assert render(again) == torch_bytes(state)
    back = planner.plan(make(), name="a")
    assert back.cached
    assert render(back) == render(first) == torch_bytes(make())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MISSES)
def test_a_changed_structure_is_planned_anew(name):
    make, change = MISSES[name]
    planner, state = Planner(), make()
    planner.plan(make(), name="a")
    change(state)
    again = planner.plan(state, name="a")
    assert not again.cached
    assert render(again) == torch_bytes(state)


ONE, WORD = torch.ones(3), "".join(["wo", "rd"])
IDENTITIES = {
    "two_storages_become_one_tensor": ([torch.ones(3), torch.zeros(3)], [ONE, ONE]),
    "one_tensor_becomes_two_storages": ([ONE, ONE], [torch.ones(3), torch.zeros(3)]),
    "two_views_become_one_tensor": ([ONE, ONE[:]], [ONE, ONE]),
    "one_tensor_becomes_two_views": ([ONE, ONE], [ONE, ONE[:]]),
    "two_texts_become_one": ([WORD, "".join(["wor", "d"])], [WORD, WORD]),
    "one_text_becomes_two": ([WORD, WORD], [WORD, "".join(["wor", "d"])]),
    "torchs_own_text_becomes_another": (["cpu", ONE], ["".join(["c", "pu"]), ONE]),
    "a_key_becomes_torchs_own_text": ({"".join(["c", "pu"]): ONE}, {"cpu": ONE}),
    "two_lists_become_one": ([[1], [1]], [(one := [1]), one]),
    "strides_where_a_size_is_one": ([torch.ones(1, 3)], [torch.ones(9).as_strided((1, 3), (7, 1))]),
    "strides_without_elements": ([torch.ones(0, 3)], [torch.ones(9).as_strided((0, 3), (7, 1))]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IDENTITIES)
def test_equal_values_that_are_other_objects_are_written_as_torch_writes_them(name):
    before, after = IDENTITIES[name]
    planner = Planner()
    planner.plan(before, name="a")
    assert render(planner.plan(after, name="a")) == torch_bytes(after)


def test_fresh_state_dicts_of_a_module_hit():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    planner = Planner()
    assert [planner.plan(model.state_dict()).cached for _ in range(3)] == [False, True, True]
    model(torch.randn(4, 2))
    assert render(planner.plan(model.state_dict())) == torch_bytes(model.state_dict())


def test_plans_keep_nothing_of_the_user_alive():
    planner = Planner()
    state = base_state()
    planned = planner.plan(state)
    planned = planner.plan(state)
    watched = [weakref.ref(state["model"]["layer.weight"]), weakref.ref(state["model"])]
    plan = planned.plan
    del state, planned
    gc.collect()
    assert [ref() for ref in watched] == [None, None]
    assert plan.file_bytes > 0


@pytest.mark.parametrize("extra", [{}, {"o": bytearray(1)}], ids=["fast", "torch"])
def test_the_first_plan_waits_for_no_collector_to_let_go(extra):
    state = {"t": torch.ones(3), **extra}
    watched = weakref.ref(state["t"])
    gc.collect()
    gc.disable()
    try:
        Planner().plan(state)
        del state
        assert watched() is None
    finally:
        gc.enable()


def test_the_cache_is_bounded_and_remembers_by_structure():
    planner = Planner()
    states = [{"t": torch.ones(n)} for n in range(1, 18)]
    for number, state in enumerate(states):
        planner.plan(state, name=str(number))
    assert not planner.plan(states[0], name="0").cached
    assert planner.plan(states[16], name="other").cached


def test_tensor_paths_and_counts():
    planned = Planner().plan(base_state())
    assert len(planned.tensors) == 3
    assert planned.tensor_paths() == ["['model']['layer.weight']", "['model']['layer.bias']", "['model']['view']"]
    recorded = Planner().plan({"o": bytearray(1), "m": [torch.ones(1)]})
    assert recorded.plan.planner == "torch"
    assert recorded.tensor_paths() == ["['m'][0]"]
