"""Objects beside containers and tensors: planned without torch's pickler where that is provably the same, and else by
it.
"""

from __future__ import annotations

import copyreg
import sys
import types
import warnings
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from async_ckpt.errors import UnsupportedStateError
from async_ckpt.plan.planner import Planner
from tests.support import objects
from tests.support.comparing import torch_bytes
from tests.support.objects import LEFT_TO_TORCH, OBJECTS
from tests.support.render import render

pytestmark = pytest.mark.filterwarnings("ignore")


def make(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {"t": torch.ones(3), "object": OBJECTS[kind](), "after": ["text", torch.arange(4)]}


@pytest.mark.wide
@pytest.mark.parametrize("kind", OBJECTS)
def test_bytes_are_those_of_torch_save_and_plans_are_reused(kind):
    state = make(kind)
    planner = Planner()
    first = planner.plan(state)
    assert render(first) == torch_bytes(state)
    again = planner.plan(state)
    assert render(again) == torch_bytes(state)
    other = make(kind)
    assert render(planner.plan(other)) == torch_bytes(other)
    assert (first.plan.planner, first.cached, again.cached) == ("fast", False, True)


@pytest.mark.parametrize("kind", LEFT_TO_TORCH)
def test_what_is_not_provably_plain_is_left_to_torch(kind):
    state = {"t": torch.ones(3), "object": LEFT_TO_TORCH[kind]()}
    planner = Planner()
    for _ in range(2):
        planned = planner.plan(state)
        assert planned.plan.planner == "torch"
        assert render(planned) == torch_bytes(state)


def test_code_of_an_object_runs_once_per_save():
    planner = Planner()
    state = {"t": torch.ones(1), "o": objects.Choosy()}
    for _ in range(3):
        objects.CALLS.clear()
        planner.plan(state)
        assert len(objects.CALLS) == 1


def _scaler(state):
    state["scaler"].cur_scale /= 2
    state["scaler"].cur_iter += 1000
    state["scaler"].inner.start = None if state["scaler"].inner.start is None else 1 << 40


def _fragment(state):
    state["fragments"][1].numel = 70_000


def _random(state):
    state["rng"] = np.random.RandomState(9).get_state()


def _blob(state):
    state["blob"] = "änders".encode() * 100


def _numpy_scalar(state):
    state["best"] = np.float64(0.7)


def _size(state):
    state["shapes"]["a"] = torch.Size((70_000, 3))


CHANGES = {
    "scaler": _scaler,
    "fragment": _fragment,
    "random": _random,
    "blob": _blob,
    "numpy_scalar": _numpy_scalar,
    "size": _size,
}


def _short_blob(state):
    state["blob"] = b"x"


def _same_blob(state):
    state["other_blob"] = state["blob"]


def _enum(state):
    state["stage"] = objects.Stage.SECOND


def _class(state):
    state["class"] = torch.nn.Conv1d


def _attribute(state):
    state["scaler"].new = 1


def _no_attribute(state):
    del state["fragments"][0].note


def _other_class(state):
    state["fragments"][0] = objects.Frozen(1.0)


def _dtype(state):
    state["scaler"].dtype = torch.bfloat16


def _shared_object(state):
    state["fragments"][1] = state["fragments"][0]


def _shared_dict(state):
    state["vars"] = vars(state["scaler"])


def _set(state):
    state["set"] = {1, 2, 3}


def _size_length(state):
    state["shapes"]["a"] = torch.Size((1, 2, 3))


def _size_to_tuple(state):
    state["shapes"]["a"] = (2, 3)


def _latin1(state):
    state["text"] = "".join(("lat", "in1"))


def _array(state):
    state["array"] = np.zeros((3, 2))


MISSES = {
    "short_blob": _short_blob,
    "same_blob": _same_blob,
    "class": _class,
    "attribute": _attribute,
    "no_attribute": _no_attribute,
    "other_class": _other_class,
    "dtype": _dtype,
    "shared_object": _shared_object,
    "shared_dict": _shared_dict,
    "set": _set,
    "size_length": _size_length,
    "size_to_tuple": _size_to_tuple,
    "latin1": _latin1,
    "array_kind": _array,
}


def base_state():
    return {
        "weights": OrderedDict(a=torch.arange(6.0).view(2, 3)),
        "scaler": objects.Scaler(),
        "fragments": [objects.Fragment(1, 2), objects.Fragment(3, 4)],
        "shapes": OrderedDict(a=torch.Size((2, 3))),
        "stage": objects.Stage.FIRST,
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


@pytest.mark.parametrize("change", CHANGES)
def test_changed_numbers_and_bytes_are_spliced_in(change):
    planner = Planner()
    assert not planner.plan(base_state(), name="a").cached
    state = base_state()
    CHANGES[change](state)
    again = planner.plan(state, name="a")
    assert again.cached
    assert render(again) == torch_bytes(state)
    back = planner.plan(base_state(), name="a")
    assert back.cached
    assert render(back) == torch_bytes(base_state())


def test_an_enumeration_is_told_by_its_value():
    planner = Planner()
    planner.plan(base_state())
    state = base_state()
    _enum(state)
    assert render(planner.plan(state)) == torch_bytes(state)


@pytest.mark.parametrize("change", MISSES)
def test_a_changed_structure_is_planned_anew(change):
    planner = Planner()
    planner.plan(base_state(), name="a")
    state = base_state()
    MISSES[change](state)
    again = planner.plan(state, name="a")
    assert not again.cached
    assert render(again) == torch_bytes(state)


@pytest.fixture
def own_module():
    module = types.ModuleType("tests_own_module")
    exec("class Thing:\n    def __init__(self):\n        self.x = 1\n", vars(module))
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def test_a_class_whose_name_means_another_one_by_now_is_refused_as_torch_does(own_module):
    planner = Planner()
    thing = own_module.Thing()
    assert planner.plan([thing]).plan.planner == "fast"
    assert planner.plan([thing]).cached
    own_module.Thing = type("Thing", (), {"__module__": own_module.__name__})
    with pytest.raises(UnsupportedStateError, match=r"\[0\] \(Thing\) cannot be saved: PicklingError"):
        planner.plan([thing])


def test_a_reducer_registered_later_is_heeded(own_module, monkeypatch):
    planner = Planner()
    thing = own_module.Thing()
    planner.plan([thing])
    monkeypatch.setitem(copyreg.dispatch_table, own_module.Thing, lambda obj: (own_module.Thing, ()))
    planned = planner.plan([thing])
    assert planned.plan.planner == "torch"
    assert render(planned) == torch_bytes([thing])


def test_a_method_given_to_a_class_later_is_heeded(own_module):
    planner = Planner()
    thing = own_module.Thing()
    planner.plan([thing])
    own_module.Thing.__getstate__ = lambda self: {"x": 5}
    assert render(planner.plan([thing])) == torch_bytes([thing])


def test_paths_inside_objects():
    state = {
        "n": objects.Fragment(1, 2, more=[torch.ones(1)]),
        "d": __import__("collections").defaultdict(list, {"k": torch.ones(2)}),
        "s": objects.Point(1.0, torch.ones(3)),
    }
    planned = Planner().plan(state)
    assert planned.plan.planner == "fast"
    assert planned.tensor_paths() == ["['d']['k']", "['s'][1]", "['n'].more[0]"]


_leaves = st.one_of(
    st.integers(-300, 300),
    st.binary(max_size=3),
    st.text("latin1", max_size=2),
    st.floats(),
    st.complex_numbers(),
    st.none(),
)
_kinds = st.sampled_from(sorted(set(OBJECTS) - {"module"}))


@st.composite
def _nests(draw):
    """Objects in objects, met again and again."""
    seen = []

    def build(depth):
        choice = draw(st.integers(0, 9))
        if choice == 0 and seen:
            return draw(st.sampled_from(seen))
        if choice <= 2 or depth == 0:
            return draw(
                st.one_of(
                    st.integers(-300, 300),
                    st.binary(max_size=3),
                    st.text("latin1", max_size=2),
                    st.floats(),
                    st.complex_numbers(),
                )
            )
        if choice <= 5:
            made = OBJECTS[draw(_kinds)]()
        elif choice == 6:
            made = objects.Fragment(build(depth - 1), 1, "s", [build(depth - 1)])
        elif choice == 7:
            made = objects.Point(build(depth - 1), build(depth - 1))
        elif choice == 8:
            made = types.SimpleNamespace(
                **{name: build(depth - 1) for name in draw(st.lists(st.sampled_from("abc"), unique=True))}
            )
        else:
            made = objects.Row(build(depth - 1) for _ in range(draw(st.integers(0, 3))))
            if draw(st.booleans()):
                made.back = draw(st.sampled_from([made, seen, vars(made)]))  # type: ignore[attr-defined]
        seen.append(made)
        return made

    return [build(3) for _ in range(draw(st.integers(1, 4)))]


@pytest.mark.wide
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(_nests())
def test_random_nests_of_objects(state):
    expected = torch_bytes(state)
    planner = Planner()
    planned = planner.plan(state)
    assert render(planned) == expected
    again = planner.plan(state)
    # A named tuple may hold itself, through a list: torch knows what becomes of that.
    assert (planned.plan.planner, again.cached) in (("fast", True), ("torch", False))
    assert render(again) == torch_bytes(state)
