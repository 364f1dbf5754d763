"""A guard is asked for, never a default, and is refused by name for what changes weights between the optimizer's
steps.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from async_ckpt import ConfigError
from async_ckpt.integrations.guarding import check_guardable, torch_optimizer

pytestmark = pytest.mark.wide


class ScheduleFree(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class SAM(torch.optim.SGD):
    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


class Lomo(torch.optim.SGD):
    def fused_backward(self, loss: Any, lr: float) -> None: ...


class Wrapped:
    """As a framework's wrapper, which may have `train` and `eval` of its own."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def train(self) -> None: ...

    def eval(self) -> None: ...


def model(max_norm: float | None = None) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Embedding(4, 4, max_norm=max_norm), torch.nn.Linear(4, 1))


@pytest.mark.parametrize("kind", [ScheduleFree, SAM, Lomo])
def test_an_optimizer_that_changes_weights_outside_its_step_is_named(kind: Any) -> None:
    net = model()
    with pytest.raises(ConfigError, match=rf"{kind.__name__}.*guard=False"):
        check_guardable(kind(net.parameters(), lr=0.1), net)


@pytest.mark.parametrize("kind", [torch.nn.Embedding, torch.nn.EmbeddingBag])
def test_a_layer_that_renormalizes_its_weights_is_named(kind: Any) -> None:
    net = torch.nn.ModuleDict({"tokens": kind(4, 4, max_norm=1.0)})
    with pytest.raises(ConfigError, match=rf"{kind.__name__}.max_norm=1. 'tokens'.*guard=False"):
        check_guardable(torch.optim.SGD(net.parameters(), lr=0.1), net)


def test_others_pass_and_wrappers_are_looked_through() -> None:
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    check_guardable(optimizer, net)
    assert torch_optimizer(Wrapped(Wrapped(optimizer))) is optimizer
    assert torch_optimizer(object()) is None


def test_no_integration_guards_unasked() -> None:
    found = []
    for name, what in (("huggingface", "attach"), ("deepspeed", "attach"), ("lightning", "AsyncCkptIO")):
        module = pytest.importorskip(f"async_ckpt.integrations.{name}")
        found.append(inspect.signature(getattr(module, what)).parameters["guard"].default)
    assert found == [False, False, False]
