"""Scalars are patched into torch's own bytes: after any change of them, the file is the one that torch writes."""

from __future__ import annotations

import enum
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from async_ckpt.plan.cached_plan import find_sites
from async_ckpt.plan.planner import Planner
from async_ckpt.plan.structure import MIN_RUN, NotPlainError, Structure
from async_ckpt.plan.torch_layout import Recorded
from tests.support import objects
from tests.support.comparing import torch_bytes
from tests.support.render import render
from tests.support.states import PLAIN, STATES

pytestmark = pytest.mark.filterwarnings("ignore")


def pickled_of(state: Any) -> bytes:
    recorded = Recorded(state)
    recorded.lay_out(64, is_apart=False)
    return recorded.pickled


def changed(value: Any, chance: random.Random, rate: float) -> Any:
    """`value` with some of its scalars changed to others of their type, in place where it can be changed."""
    if type(value) in (dict, OrderedDict):
        for key in value:
            value[key] = changed(value[key], chance, rate)
    elif type(value) is list:
        value[:] = [changed(item, chance, rate) for item in value]
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.Tensor, enum.Enum)):
        changed(vars(value), chance, rate)
    if chance.random() > rate:
        return value
    if type(value) is int:
        return chance.choice((0, 255, 256, -1, 70_000, -(1 << 31), 1 << 31, 1 << 63, -(1 << 300), 1 << 5000))
    if type(value) is float:
        return chance.choice((0.0, -0.0, float("nan"), float("inf"), chance.random()))
    if type(value) is bool:
        return not value
    if type(value) is bytes and len(value) > 1:
        return chance.randbytes(chance.randint(2, 9))
    if type(value) is tuple and value and set(map(type, value)) <= {int, float}:
        return tuple(changed(item, chance, 1.0) for item in value)
    return value


def every_kind() -> dict[str, Any]:
    generator = random.Random(4)
    return {
        "model": OrderedDict(a=torch.arange(6.0).view(2, 3), b=torch.arange(6.0)[2:]),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "step": 7,
        "lr": 0.1,
        "flags": [True, None, (0.9, 0.999)],
        "history": [0.1 * k for k in range(100)],
        "mixed": [1, 2.5, True, None] * 10,
        "limits": list(range(2001)),
        "thousand": [0.5] * 1000,
        "tuple": tuple(range(20)),
        "scaler": objects.Scaler(),
        "fragments": [objects.Fragment(1, 2), objects.Fragment(3, 4)],
        "rng": generator.getstate(),
        "numpy": np.random.RandomState(3).get_state(),
        "best": np.float64(0.5),
        "blob": b"blob",
        "bytes": [b"one", b"two"],
        "shared": [[1] * 20] * 3,
        3: {None: 1, True: 2.5},
        "size": torch.Size((3, 4)),
        "set": {5},
    }


@pytest.mark.wide
@pytest.mark.parametrize("seed", range(12))
def test_random_changes_of_scalars_give_what_torch_writes(seed: int) -> None:
    chance, planner, state = random.Random(seed), Planner(), every_kind()
    assert not planner.plan(state).cached
    for _ in range(6):
        changed(state, chance, rate=chance.choice((0.05, 0.5)))
        planned = planner.plan(state)
        assert planned.cached
        assert render(planned) == torch_bytes(state)


@pytest.mark.parametrize("name", sorted(PLAIN))
def test_random_changes_in_every_kind_of_state(name: str) -> None:
    chance, planner, state = random.Random(name), Planner(), STATES[name]()
    planner.plan(state)
    for _ in range(3):
        if name not in ("cyclic", "recursive_tuple"):
            state = changed(state, chance, rate=0.3)
        assert render(planner.plan(state)) == torch_bytes(state)


@pytest.mark.parametrize("text", ["words", "word", "", "cpu", "storage", "0", "\ud800", "é" * 300])
def test_another_text_is_written_by_torch_again(text: str) -> None:
    planner, state = Planner(), every_kind() | {"text": "worte", "same": "worte"}
    planner.plan(state)
    state["text"] = text
    planned = planner.plan(state)
    assert not planned.cached
    assert render(planned) == torch_bytes(state)


def test_views_are_compacted_the_same_way_after_a_change() -> None:
    base = torch.arange(1000.0)
    model = torch.nn.Linear(5, 5)

    def state(step: int) -> Any:
        views = {"part": base[10:20], "other": base[15:30], "column": torch.ones(4, 500)[:, 3], "whole": torch.ones(3)}
        return {"views": views, "model": model.state_dict(), "p": model.weight, "empty": base[5:5], "step": step}

    planner = Planner(compact_views=True)
    assert not planner.plan(state(1)).cached
    for step in (2, 1 << 90, -1):
        planned = planner.plan(state(step))
        assert planned.cached
        assert render(planned) == render(Planner(compact_views=True).plan(state(step)))


RUNS: dict[str, Callable[[int], Any]] = {
    "floats": lambda n: [0.5 * k for k in range(n)],
    "numbers": lambda n: [k * 300 for k in range(n)],
    "of every kind": lambda n: [(1, 0.5, None, True)[k % 4] for k in range(n)],
    "a tuple": lambda n: tuple(range(n)),
}


@pytest.mark.parametrize("kind", RUNS)
def test_a_history_may_grow_and_shrink(kind: str) -> None:
    planner = Planner()
    for number, length in enumerate((MIN_RUN, MIN_RUN + 1, 999, 1000, 1001, 2000, 2001, MIN_RUN)):
        state = {"history": RUNS[kind](length), "w": torch.ones(3), "again": "text"}
        planned = planner.plan(state)
        assert planned.cached is (number > 0)
        assert render(planned) == torch_bytes(state)


@pytest.mark.parametrize("item", ["text", torch.ones(1), (1, 2), [], b"xy", np.float64(1)])
def test_a_history_that_gets_something_else_is_planned_anew(item: Any) -> None:
    planner = Planner()
    for history in ([1.5] * 30, [1.5] * 29 + [item], [1.5] * 5):
        state = {"history": history, "w": torch.ones(3)}
        planned = planner.plan(state)
        assert not planned.cached
        assert render(planned) == torch_bytes(state)


def test_one_history_in_two_places_is_one() -> None:
    planner, history = Planner(), [0.5] * 40
    states: list[Any] = [{"a": history, "b": history}, {"a": [0.5] * 40, "b": [0.5] * 40}, {"a": history, "b": history}]
    for name, state, cached in zip("abc", states, (False, False, True), strict=True):
        planned = planner.plan(state, name=name)
        assert planned.cached is cached
        assert render(planned) == torch_bytes(state)
        history.append(1.0)


def test_a_state_of_very_many_small_objects_is_left_to_torch() -> None:
    planner = Planner()
    state = {"h": [{"loss": 0.1 * k, "step": k} for k in range(20_000)], "w": torch.ones(2)}
    for _ in range(3):
        state["h"].append({"loss": 0.5, "step": 3})  # type: ignore[attr-defined]
        planned = planner.plan(state, name="a")
        assert (planned.cached, planned.plan.planner) == (False, "torch")
    assert render(planned) == torch_bytes(state)
    assert planner.plan({"w": torch.ones(2)}, name="b").plan.planner == "fast"


def test_a_scalar_that_is_not_where_it_should_be_is_not_placed() -> None:
    state = {"a": 1, "b": [2.5, 3]}
    pickled = pickled_of(state)
    structure = Structure(state)
    leaves = structure.finish((), frozenset())
    sites, _ = find_sites(structure, leaves, pickled)
    assert [pickled[start:end] for start, end in sites] == [
        b"K\x01",
        b"K\x03",
        b"G\x40\x04" + bytes(6),
    ]
    for other in (
        {"a": 2, "b": [2.5, 3]},
        {"a": 1, "b": [2.5, 3, 4]},
        {"b": [2.5, 3], "a": 1},
        {"a": 1, "b": (2.5, 3)},
        [1, [2.5, 3]],
    ):
        with pytest.raises(NotPlainError):
            find_sites(structure, leaves, pickled_of(other))


def test_scalars_that_pickle_writes_twice_are_not_patched() -> None:
    """A tuple that holds itself is written twice, and the first time thrown away."""
    planner = Planner()
    for number in (1, 2):
        pair: Any = ([], number)
        pair[0].append(pair)
        state = {"pair": pair}
        planned = planner.plan(state)
        assert (planned.cached, planned.plan.planner) == (False, "torch")
        assert render(planned) == torch_bytes(state)


def test_no_tensor_is_read_and_nothing_is_kept_of_a_state() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planner, state = Planner(), every_kind()
        planner.plan(state)
        state["model"]["a"].fill_(5)
        assert planner.plan(state).cached
