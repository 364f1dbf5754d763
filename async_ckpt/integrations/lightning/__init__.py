"""Lightning: a `CheckpointIO` plugin that writes in the background.

    from async_ckpt.integrations.lightning import AsyncCkptIO

    trainer = Trainer(plugins=[AsyncCkptIO(staging_bytes=4 << 30)], callbacks=[ModelCheckpoint(save_top_k=3,
    save_last=True)])

Checkpoints stay what they are: one `.ckpt` file at the path that `ModelCheckpoint` chose, byte for byte what
``torch.save`` writes, readable by stock Lightning and ``torch.load``. A file appears at its path in one rename, when it
is complete and durable. Needs ``pip install 'async-ckpt[lightning]'``; run with lightning 2.6.6 and 2.4.0,
pytorch-lightning 2.6.6.
"""

from __future__ import annotations

from .checkpoint_io import AsyncCkptIO

__all__ = ["AsyncCkptIO"]
