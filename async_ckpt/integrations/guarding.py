"""Which optimizers a guard cannot protect: those that change weights outside of their own `step`.

Guarded saves copy behind the next forward and backward, because nothing changes the optimizer's tensors before its
next step. Integrations guard only where they are asked to, and refuse at once what would tear later.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ConfigError


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer inside a framework's wrappers; None where there is none."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None


def check_guardable(optimizer: torch.optim.Optimizer, *modules: torch.nn.Module) -> None:
    """Refuse a guard over `optimizer`, which trains `modules`, if their tensors also change between its steps. Raises
    ConfigError: names the optimizer or the layer, and says ``guard=False``."""
    reason = _reason(optimizer)
    if reason is not None:
        raise ConfigError(
            f"guard=True cannot protect {type(optimizer).__name__}: {reason}. Give guard=False: saves copy it at once"
        )
    for module in modules:
        for name, layer in module.named_modules():
            if isinstance(layer, (torch.nn.Embedding, torch.nn.EmbeddingBag)) and layer.max_norm is not None:
                raise ConfigError(
                    f"guard=True cannot protect {type(layer).__name__}(max_norm={layer.max_norm:g}) {name!r}: each "
                    "forward scales its weights down in place. Give guard=False: saves copy it at once"
                )


def _reason(optimizer: torch.optim.Optimizer) -> str | None:
    def has(*names: str) -> bool:
        return all(callable(getattr(optimizer, name, None)) for name in names)

    if has("train", "eval"):
        return "its train() and eval() exchange the weights (schedule-free)"
    if has("first_step", "second_step"):
        return "its first_step() moves the weights before the second one's step (sharpness-aware minimization)"
    if has("fused_backward"):
        return "it steps inside the backward pass"
    return None
