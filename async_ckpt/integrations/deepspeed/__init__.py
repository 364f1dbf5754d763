"""DeepSpeed: a drop-in checkpoint engine whose writes overlap training.

    engine, *_ = deepspeed.initialize(...)
    async_ckpt.integrations.deepspeed.attach(engine, "runs/gpt")      # after initialize, on every rank

From then on `save_checkpoint` returns as soon as the state has been copied; the files, their checksums, the rename
and `latest` follow in the background, over many steps. `load_checkpoint` and `destroy` wait for them first.
Needs ``pip install 'async-ckpt[deepspeed]'``; run with DeepSpeed 0.19.8.
"""

from __future__ import annotations

from .attach import attach
from .engine import AsyncDeepSpeedEngine

__all__ = ["AsyncDeepSpeedEngine", "attach"]
