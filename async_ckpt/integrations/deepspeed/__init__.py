"""DeepSpeed: a drop-in checkpoint engine whose writes overlap training.

    engine, *_ = deepspeed.initialize(...)
    async_ckpt.integrations.deepspeed.attach(engine, "runs/gpt")      # after initialize, on every rank

Needs ``pip install 'async-ckpt[deepspeed]'``; run with DeepSpeed 0.19.8.
"""

from __future__ import annotations

from .attach import attach
from .engine import AsyncDeepSpeedEngine

__all__ = ["AsyncDeepSpeedEngine", "attach"]
