"""Have tensors the facts they had before? One call of torch's own guards instead of seven attribute reads per tensor.

`torch.compile` guards its graphs with the same class (`TensorGuards`): per tensor the exact type, dtype, device, sizes,
strides, `requires_grad` and the dispatch keys, which hold conjugate and negative bits. It is internal to torch, so it
is tried on tiny tensors once per process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

Same = Callable[[Sequence[torch.Tensor]], bool]


def same_facts(tensors: Sequence[torch.Tensor]) -> Same | None:
    """A function that says True only for as many tensors with the same facts, in the same order; None where torch has
    no such guards.

    It takes strided tensors alone, none nested: a layout without strides ends the process. It may say False for equal
    ones (in inference mode, say). Storages, their offsets and Python attributes are not compared. It keeps no tensor
    alive.
    """
    return _guards_of(tensors) if _guards_work() else None


def _guards_of(tensors: Sequence[torch.Tensor]) -> Same:
    guards: Any = torch._C._dynamo.guards
    # Without gradients enabled torch takes requires_grad for False.
    with torch.enable_grad():
        check = guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    count = len(tensors)

    def same(others: Sequence[torch.Tensor]) -> bool:
        if len(others) != count:
            return False
        with torch.enable_grad():
            return check(*others) is True

    return same


@lru_cache(maxsize=1)
def _guards_work() -> bool:
    """Whether this torch has the guards, and they tell each fact apart."""
    try:
        with torch.inference_mode(False), torch.device("cpu"):
            plain, turned = torch.empty(2, 3), torch.empty(2, 3, dtype=torch.complex64)
            others = (
                torch.empty(3, 2),
                torch.empty(3, 2).t(),
                torch.empty(2, 3, dtype=torch.int32),
                torch.empty(2, 3, device="meta"),
                torch.empty(2, 3, requires_grad=True),
                torch.nn.Parameter(torch.empty(2, 3), requires_grad=False),
                torch._neg_view(plain),
            )
            same, same_complex = _guards_of([plain]), _guards_of([turned])
            with torch.no_grad():
                right = (
                    same([torch.empty(2, 3)]) and same_complex([turned.clone()]) and not same_complex([turned.conj()])
                )
                return right and not same([]) and not any(same([other]) for other in others)
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
