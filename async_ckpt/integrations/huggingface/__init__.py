"""Hugging Face: `Trainer` and Accelerate checkpoints that are written in the background.

    from async_ckpt.integrations.huggingface import attach

    trainer = Trainer(model, args, train_dataset=...)
    attach(trainer, staging_bytes=4 << 30)
    trainer.train(resume_from_checkpoint=True)

or, for a class of one's own, ``class MyTrainer(AsyncCheckpointTrainerMixin, Trainer)``. Checkpoints keep their names,
files and formats (``checkpoint-500/model.safetensors``, ``optimizer.pt``, ...), plus a manifest: ``from_pretrained``
and stock `Trainer` read them. A directory appears under its name in one rename, when all of it is durable.

For Accelerate: `save_accelerator_state` and `load_accelerator_state`. Needs ``pip install 'async-ckpt[huggingface]'``;
run with transformers 5.24.0 and accelerate 1.15.0, and with 4.57.6 and 1.10.1.
"""

from __future__ import annotations

from .accelerator import load_accelerator_state, save_accelerator_state
from .resume import last_committed_checkpoint
from .trainer import AsyncCheckpointTrainerMixin, attach

__all__ = [
    "AsyncCheckpointTrainerMixin",
    "attach",
    "last_committed_checkpoint",
    "load_accelerator_state",
    "save_accelerator_state",
]
