"""Objects beside containers and tensors: planned without torch's pickler where that is provably the same, and else by
it.
"""

from __future__ import annotations

import copyreg
import sys
import types
import warnings

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


def test_an_enumeration_is_told_by_its_value():
    planner = Planner()
    planner.plan({"stage": objects.Stage.FIRST})
    state = {"stage": objects.Stage.SECOND}
    assert render(planner.plan(state)) == torch_bytes(state)


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
    st.integers(-300, 300), st.binary(max_size=3), st.text("latin1", max_size=2), st.floats(), st.complex_numbers()
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
            return draw(_leaves)
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
