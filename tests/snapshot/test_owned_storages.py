"""Which storages are guarded: those that the optimizers own, and never one that only lies where one of theirs lay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch

from async_ckpt.snapshot.guard import Guard
from async_ckpt.snapshot.owned_storages import NOTHING, OwnedStorages, storage_ids


def ids(*tensors: torch.Tensor) -> set[int]:
    return {*chain.from_iterable(map(storage_ids, tensors))}


def stepped(
    make: Callable[[Any], torch.optim.Optimizer], num: int = 3
) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
    parameters = [torch.nn.Parameter(torch.zeros(10)) for _ in range(num)]
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(10)
    optimizer.step()
    return parameters, optimizer


def owned(optimizer: torch.optim.Optimizer) -> set[int]:
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return ids(*tensors)


@pytest.mark.wide
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p),
        lambda p: torch.optim.SGD(p, momentum=0.9),
        lambda p: torch.optim.SGD(p),
        lambda p: torch.optim.Adagrad(p),
    ],
)
def test_parameters_and_state(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    _, optimizer = stepped(make)
    known = OwnedStorages()
    assert known.look([optimizer]).ids == owned(optimizer)
    assert known.look([optimizer]).ids is known.look([optimizer]).ids


def test_state_that_is_not_all_tensors() -> None:
    weight = torch.nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.LBFGS([weight])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight - 1).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert OwnedStorages().look([optimizer]).ids == owned(optimizer) > ids(weight)


@pytest.mark.parametrize("state", [{"x": torch.zeros(3).to_sparse()}, {"x": None, "y": "text"}, ["not a dict"], 7])
def test_odd_states_are_simply_not_guarded(state: Any) -> None:
    parameters, optimizer = stepped(lambda p: torch.optim.SGD(p))
    optimizer.state[parameters[0]] = state
    assert OwnedStorages().look([optimizer]).ids == ids(*parameters)


def test_tensors_that_others_wrap() -> None:
    class Wrapped(torch.Tensor):
        pass

    parameters, optimizer = stepped(lambda p: torch.optim.SGD(p))
    optimizer.state[parameters[0]] = {"x": torch.zeros(3).as_subclass(Wrapped)}
    assert OwnedStorages().look([optimizer]).ids == owned(optimizer)


def test_under_a_default_device() -> None:
    _, optimizer = stepped(lambda p: torch.optim.AdamW(p))
    with torch.device("meta"):
        assert OwnedStorages().look([optimizer]).ids == owned(optimizer)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda p, o: setattr(p[1], "data", torch.ones(10)), id="data"),
        pytest.param(lambda p, o: o.load_state_dict(o.state_dict()), id="load_state_dict"),
        pytest.param(
            lambda p, o: o.add_param_group({"params": [torch.nn.Parameter(torch.zeros(4))]}), id="add_param_group"
        ),
        pytest.param(lambda p, o: o.state.clear(), id="cleared"),
        pytest.param(lambda p, o: p[2].data.set_(torch.ones(10)), id="set_"),
    ],
)
def test_changes_are_seen(change: Callable[[Any, Any], Any]) -> None:
    parameters, optimizer = stepped(lambda p: torch.optim.AdamW(p))
    known = OwnedStorages()
    known.look([optimizer])
    kept = [p.data for p in parameters]
    change(parameters, optimizer)
    assert known.look([optimizer]).ids == owned(optimizer)
    del kept


def test_an_identity_is_not_given_to_another_storage_while_it_is_known() -> None:
    """A tensor in the place of one that an optimizer owned must not be taken for guarded, and copied behind its owner's
    back.
    """
    parameters, optimizer = stepped(lambda p: torch.optim.AdamW(p), num=50)
    known = OwnedStorages()
    before = known.look([optimizer]).ids
    optimizer.state.clear()
    optimizer.zero_grad()
    gc.collect()
    strangers = [torch.zeros(10) for _ in range(500)]
    assert before.isdisjoint(ids(*strangers))
    # The same memory through another storage: not known, hence copied eagerly.
    alias = torch.frombuffer(memoryview(parameters[0].detach().numpy()), dtype=torch.float32)
    assert alias.data_ptr() == parameters[0].data_ptr()
    parameters[0].data = alias
    assert ids(alias).isdisjoint(known.look([optimizer]).ids) or ids(alias) <= owned(optimizer)


def test_nothing_is_kept_alive() -> None:
    parameters, optimizer = stepped(lambda p: torch.optim.AdamW(p))
    known = OwnedStorages()
    known.look([optimizer])
    dropped = [weakref.ref(p) for p in parameters]
    big = torch.nn.Parameter(torch.zeros(1 << 20))
    optimizer.add_param_group({"params": [big]})
    [storage] = storage_ids(big)
    users = torch._C._storage_Use_Count(storage)
    known.look([optimizer])
    assert torch._C._storage_Use_Count(storage) == users
    del optimizer, parameters
    gc.collect()
    assert [reference() for reference in dropped] == [None] * 3


def test_a_guard_knows_what_an_optimizer_was_given_since() -> None:
    _, optimizer = stepped(lambda p: torch.optim.AdamW(p))
    guard = Guard(1.0, lambda: None)
    guard.add(optimizer)
    first = guard.owned([*owned(optimizer)])
    assert first.covers and first.ids == owned(optimizer) and guard.owned([*owned(optimizer), 1]).ids is first.ids
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert guard.owned([*owned(optimizer)]).ids == owned(optimizer)
    guard.remove()


def test_what_is_asked_about_is_looked_for_where_it_is_not_known() -> None:
    parameters, optimizer = stepped(lambda p: torch.optim.AdamW(p))
    known = OwnedStorages()
    stranger = torch.zeros(10)
    assert known.of([optimizer], [*ids(stranger)]) is known.of([optimizer], []) is NOTHING
    assert known.of([optimizer], [*ids(*parameters)]).covers
    found = known.of([optimizer], [*ids(parameters[0], stranger)])
    assert not found.covers and found.ids == owned(optimizer)
    parameters[1].data = torch.ones(10)
    assert known.of([optimizer], [*ids(parameters[1])]).covers, "another storage of the same parameter"
    assert known.of([], [*ids(*parameters)]) is NOTHING, "of no optimizer"
