"""Which of DeepSpeed's optimizers a guard protects: those that change nothing before their torch optimizer's step."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import ConfigError
from ..guarding import check_guardable, torch_optimizer

# Read for each: gradients alone are touched before the inner step; half precision copies and gathered weights follow
# it.
_KNOWN = frozenset(
    (
        "BF16_Optimizer",
        "DeepSpeedZeroOptimizer",
        "DeepSpeedZeroOptimizer_Stage3",
        "FP16_Optimizer",
        "FP16_UnfusedOptimizer",
    )
)


def guardable_optimizers(ds_engine: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizer at the bottom of DeepSpeed's wrappers.

    Raises:
        ConfigError: there is none, or its tensors also change outside of its own step: Muon's momentum, states swapped
            to NVMe, optimizers that step in another process (ZenFlow, SuperOffload), and wrappers that are not known
            here.
    """
    outer = ds_engine.optimizer
    if not isinstance(outer, torch.optim.Optimizer) and type(outer).__name__ not in _KNOWN:
        raise ConfigError(
            f"guard=True needs an engine with a torch optimizer, not {type(outer).__name__}; leave it out"
        )
    inner = torch_optimizer(outer)
    if inner is None:
        raise ConfigError("guard=True needs an engine with a torch optimizer; leave it out")
    check_guardable(inner, ds_engine.module)
    reason = None
    if ds_engine.zero_nvme_offload_optimizer():
        reason = "its states are swapped through buffers that change before the step"
    elif getattr(outer, "zenflow", False) or getattr(ds_engine, "zenflow", False):
        reason = "ZenFlow steps in another process"
    elif "muon" in type(inner).__name__.lower() or getattr(outer, "use_muon", False):
        reason = "Muon's momentum changes before the step"
    if reason is not None:
        raise ConfigError(f"guard=True cannot protect this {type(inner).__name__}: {reason}; leave it out")
    return [inner]
